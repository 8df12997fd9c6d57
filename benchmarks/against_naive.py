"""`elit` against a naive masked implementation of the same network, with the same weights: see naive.py."""

import argparse
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from naive import NaiveDiT
from subjects import TrainingStep, evenly, inputs, network, served
from timing import difference, peak_bytes, take_turns
from torch import Tensor

import elit
from elit.flow.solver import euler, solve, time_grid
from elit.models.dit import DiT
from elit.sampling.sample import seeded_noise

SHARE = 0.25
"""Share of the tokens, in sampling."""
TOLERANCE = 1e-5
Models = dict[str, Any]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="B", help="S, B, L or XL")
    parser.add_argument("--sample-size", type=int, default=32, help="32 is 256px, 64 is 512px")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--budgets", type=int, default=4, help="how many are measured, from the smallest to all")
    parser.add_argument("--steps", type=int, default=2, help="of sampling")


def naive(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Outputs, training at several budgets, sampling at a quarter of the tokens, and memory of both."""
    model = network(f"ELIT-DiT-{args.size}/2", args.sample_size, args)
    if not isinstance(model, DiT):
        raise ValueError(f"size={args.size!r}: only DiT is written naively")
    models: Models = {"elit": model, "naive": NaiveDiT(model)}
    batch = inputs(model, args.batch_size)
    apart = compare_outputs(models, batch, args)
    rows = [sampling(models, args), *training(models, batch, args)]
    steps = [row for row in rows if row["work"] == "training step"]
    summary = {
        "difference": apart,
        "training_times_faster": sum(row["naive_ms"] for row in steps) / sum(row["ms"] for row in steps),
        "sampling_times_faster": rows[0]["times_faster"],
        "memory_at_most": max(row["mib"] for row in steps) / max(row["naive_mib"] for row in steps),
        "memory": sum(row["mib"] for row in steps) / sum(row["naive_mib"] for row in steps),
    }
    return rows, summary


def compare_outputs(models: Models, batch: tuple[Tensor, ...], args: argparse.Namespace) -> float:
    """The largest difference at any budget, in float32. Raises ArithmeticError where they are not one network."""
    with torch.no_grad():
        apart = {
            budget: difference(models["elit"](*batch, budget), models["naive"](*batch, budget))
            for budget in models["elit"].budgets
        }
    budget = max(apart, key=lambda key: apart[key])
    if not apart[budget] <= TOLERANCE:
        raise ArithmeticError(f"naive: outputs at budget {budget} differ by {apart[budget]:.2g} of the largest value")
    return apart[budget]


def sampling(models: Models, args: argparse.Namespace) -> dict[str, Any]:
    """Images of the same seeds without guidance: `elit.sample`, and the plain loop over the naive network."""
    model, plain = (served(deepcopy(models[kind]), args) for kind in ("elit", "naive"))
    y = (torch.arange(args.batch_size) % model.config.num_classes).to(args.device)

    def naive_sample() -> Tensor:
        def velocity(x: Tensor, t: float, step: int) -> Tensor:
            time = torch.full((len(x),), t, device=x.device)
            return plain(x.to(args.dtype), time, y, SHARE).to(x.dtype)

        noise = seeded_noise(range(args.batch_size), (args.in_channels, *model.sample_size)).to(args.device)
        with torch.no_grad():
            return solve(euler(noise, time_grid(args.steps)), velocity)

    cases: dict[str, Callable[[], Tensor]] = {
        "elit": partial(elit.sample, model, y, steps=args.steps, budget=SHARE),
        "naive": naive_sample,
    }
    return compared("sampling", round(SHARE * model.budgets[-1]), cases, args)


def training(models: Models, batch: tuple[Tensor, Tensor, Tensor], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A step at several budgets, evenly spread: their mean is that of a uniform draw."""
    steps = {kind: TrainingStep(model, batch, args) for kind, model in models.items()}
    held = {kind: step.resident_bytes for kind, step in steps.items()}
    return [
        compared("training step", budget, {kind: partial(step, budget) for kind, step in steps.items()}, args, held)
        for budget in evenly(models["elit"].budgets, args.budgets)
    ]


def compared(
    work: str, budget: int, cases: dict[str, Callable], args: argparse.Namespace, held: dict[str, int] | None = None
) -> dict[str, Any]:
    """One row. held: bytes that lie there before the work and are part of it."""
    times = take_turns(cases, args.rounds, args.device)
    mib = {kind: (peak_bytes(case, args.device) + (held[kind] if held else 0)) / 2**20 for kind, case in cases.items()}
    images = args.batch_size * (args.steps if work == "sampling" else 1)
    return {
        "work": work,
        "budget": budget,
        "ms": 1e3 * times["elit"].median,
        "naive_ms": 1e3 * times["naive"].median,
        "spread": max(time.spread for time in times.values()),
        "images_per_s": images / times["elit"].median,
        "naive_images_per_s": images / times["naive"].median,
        "times_faster": times["naive"].median / times["elit"].median,
        "mib": mib["elit"],
        "naive_mib": mib["naive"],
    }


def says(summary: dict[str, Any]) -> list[str]:
    return [
        f"outputs differ by at most {summary['difference']:.2g} of the largest value, at any budget",
        f"training, averaged over budgets: {summary['training_times_faster']:.2f} × the naive throughput, "
        f"{summary['memory']:.2f} × its peak memory ({summary['memory_at_most']:.2f} × at most)",
        f"sampling at {SHARE:.0%} of the tokens: {summary['sampling_times_faster']:.2f} × the naive throughput",
    ]
