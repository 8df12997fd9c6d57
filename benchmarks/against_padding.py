"""A batch whose samples have different budgets, against the same batch with all of them at its largest budget.

What pads also has to mask, to be right for the smaller ones; the padding here does not, so it is as fast as it can be.
"""

import argparse
import random
import statistics
from functools import partial
from typing import Any

import torch
from against_flops import without_gradients
from subjects import inference, inputs
from timing import difference, take_turns

import elit

TOLERANCE = 1e-4


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="B", help="S, B, L or XL")
    parser.add_argument("--sample-size", type=int, default=32, help="32 is 256px, 64 is 512px")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--draws", type=int, default=3, help="batches of budgets, uniform over all")


def mixed(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    model = inference(f"ELIT-DiT-{args.size}/2", args.sample_size, args)
    batch = inputs(model, args.batch_size)
    draw = random.Random(0)
    drawn = [sorted(draw.choices(model.budgets, k=args.batch_size)) for _ in range(args.draws)]
    for budgets in drawn:
        draw.shuffle(budgets)  # a server's requests come in any order
    cases = {}
    for number, budgets in enumerate(drawn):
        cases["mixed", number] = partial(without_gradients, model, batch, budgets)
        cases["padded", number] = partial(without_gradients, model, batch, max(budgets))
    times = take_turns(cases, args.rounds, args.device)
    cost = {budget: elit.count_flops(model, budget=budget) for budget in model.budgets}
    rows: list[dict[str, Any]] = []
    for number, budgets in enumerate(drawn):
        seconds, padded = times["mixed", number], times["padded", number]
        rows.append(
            {
                "budgets": budgets,
                "ms": 1e3 * seconds.median,
                "padded_ms": 1e3 * padded.median,
                "spread": max(seconds.spread, padded.spread),
                "times_faster": padded.median / seconds.median,
                "closed_form": cost[max(budgets)] / statistics.mean(cost[budget] for budget in budgets),
                "difference": from_single_runs(model, batch, budgets),
            }
        )
    summary = {
        "times_faster": sum(row["padded_ms"] for row in rows) / sum(row["ms"] for row in rows),
        "closed_form": statistics.mean(row["closed_form"] for row in rows),
        "difference": max(row["difference"] for row in rows),
    }
    return rows, summary


def from_single_runs(model: Any, batch: tuple, budgets: list[int]) -> float:
    """How far the mixed batch is from every sample run alone. Raises ArithmeticError beyond TOLERANCE in float32."""
    with torch.no_grad():
        together = model(*batch, budgets)
        singly = [model(*(part[i : i + 1] for part in batch), budget) for i, budget in enumerate(budgets)]
    apart = difference(together, torch.cat(singly))
    if together.dtype == torch.float32 and not apart <= TOLERANCE:
        raise ArithmeticError(f"mixed: a batch differs from its single runs by {apart:.2g} of the largest value")
    return apart


def says(summary: dict[str, Any]) -> list[str]:
    return [
        f"mixed budgets: {summary['times_faster']:.2f} × the throughput of padding to the largest, "
        f"the closed form says {summary['closed_form']:.2f}; {summary['difference']:.2g} from single runs"
    ]
