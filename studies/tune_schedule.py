"""The budgets over t with the least loss at a given mean cost, by the network's own loss: no images are made.

    python studies/tune_schedule.py runs/quickstart/model --data digits --mean-share 0.5

Every budget is measured on the same samples with the same noise. The schedule is the monotone one with the least mean
loss whose mean cost keeps to the limit; the search is exact. Half of the samples are searched with, the other half
measure the gain over a constant budget.
"""

import argparse
import json
import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elit.costs.flops import count_flops
from elit.elastic.load import load_network
from elit.evaluate.inspect.attention import Probe, losses
from elit.evaluate.inspect.inspection import load_probe
from elit.files import write_text
from elit.models.conditioning import Condition
from elit.models.transformer import Transformer

BudgetPath = tuple[int, float, tuple[int, ...]]
"""Cost, loss and the budgets so far, of each part its place among the valid ones."""


@dataclass(frozen=True, kw_only=True)
class TunedSchedule:
    """The result of a search. Losses are means over all times, of samples that took no part in the search."""

    schedule: str
    """As `budget` takes it."""
    budgets: tuple[int, ...]
    """Latents per window in each of the equal parts of [0, 1]."""
    share: float
    """Mean share of the latents."""
    gflops: float
    """Mean of an evaluation of one sample."""
    bound: float
    """Limit of the mean cost: a share of the latents, or GFLOPs."""
    loss: float
    constant: int
    """The largest constant budget that keeps to the bound."""
    constant_loss: float
    """Its loss."""
    interpolated_loss: float
    """The loss of constant budgets at exactly the schedule's cost: linear between the two next to it."""
    full_loss: float
    """With all latents all the way."""
    table: list[dict[str, float]]
    """The loss of every part and budget that was searched."""

    @property
    def gain(self) -> float:
        """How much lower the loss is than that of constant budgets of the same cost."""
        return self.interpolated_loss - self.loss


def tune_schedule(
    model: Transformer,
    x: Tensor,
    y: Condition,
    *,
    mean_share: float | None = None,
    mean_gflops: float | None = None,
    bins: int = 8,
    draws: int = 4,
    seed: int = 0,
    batch_size: int = 64,
) -> TunedSchedule:
    """The best monotone schedule, rising or falling over t, whose mean over t keeps to one bound.

    x, y: data as the network takes it and its conditions, at least 4 samples; every other one is searched with, the
    rest says what was gained. mean_share: of the latents. mean_gflops: of one evaluation. bins: equal parts of [0, 1];
    steps that are a multiple of them fall into the parts evenly. draws: of noise, per sample and part.
    Raises ValueError for a baseline, and for a bound that no budget keeps to.
    """
    budgets = model.budgets
    if len(budgets) < 2:
        raise ValueError("model: has no latent interface with several budgets; there is nothing to schedule")
    if (mean_share is None) == (mean_gflops is None):
        raise ValueError("mean_share, mean_gflops: give one of them")
    if bins < 1:
        raise ValueError(f"bins={bins}: give at least 1")
    flops = [count_flops(model, budget=num_latents) for num_latents in budgets]
    bound = mean_share if mean_share is not None else mean_gflops
    assert bound is not None
    costs, most = (budgets, bound * budgets[-1]) if mean_gflops is None else (flops, bound * 1e9)
    if most < costs[0]:
        least = costs[0] / budgets[-1] if mean_gflops is None else costs[0] / 1e9
        name = "mean_share" if mean_gflops is None else "mean_gflops"
        raise ValueError(f"{name}={bound:g}: the least is {least:.4g}, with {budgets[0]} latents all the way")

    measured = measure_losses(model, make_probe(x, y, bins, draws, seed, batch_size))  # (bins, budgets, B)
    searched, held_out = measured[..., 0::2].mean(-1).tolist(), measured[..., 1::2].mean(-1)
    indices = best_schedule(searched, costs, most * bins)
    constant = bisect_right(costs, most) - 1
    mean_cost = sum(costs[k] for k in indices) / bins
    by_budget = held_out.mean(0).tolist()
    return TunedSchedule(
        schedule=schedule_text([budgets[k] for k in indices]),
        budgets=tuple(budgets[k] for k in indices),
        share=sum(budgets[k] for k in indices) / bins / budgets[-1],
        gflops=sum(flops[k] for k in indices) / bins / 1e9,
        bound=bound,
        loss=sum(float(held_out[i, k]) for i, k in enumerate(indices)) / bins,
        constant=budgets[constant],
        constant_loss=by_budget[constant],
        interpolated_loss=interpolate_linearly(mean_cost, costs, by_budget),
        full_loss=by_budget[-1],
        table=[
            {"t": (i + 0.5) / bins, "budget": num_latents, "loss": searched[i][k]}
            for i in range(bins)
            for k, num_latents in enumerate(budgets)
        ],
    )


def make_probe(x: Tensor, y: Condition, bins: int, draws: int, seed: int, batch_size: int) -> Probe:
    """Samples, noise and the middle of every part of [0, 1]. Raises ValueError for too few samples."""
    if len(x) < 4:
        raise ValueError(f"count={len(x)}: give at least 4 samples, half to search with and half to judge by")
    times = tuple((i + 0.5) / bins for i in range(bins))
    return Probe(x=x, y=y, times=times, draws=draws, seed=seed, batch_size=batch_size)


def measure_losses(model: Transformer, probe: Probe) -> Tensor:
    """(T, budgets, B): the flow-matching loss of every time, budget and sample, with the same noise for all budgets."""
    return torch.stack([losses(model, probe, num_latents) for num_latents in model.budgets], 1)


def best_schedule(losses: Sequence[Sequence[float]], costs: Sequence[int], most: float) -> list[int]:
    """The budget of each part: the least sum of losses (parts × budgets), the sum of costs at most `most`.

    costs: of each budget, rising. Rising and falling sequences are both searched; of equal ones the cheaper wins.
    """
    rising = _best_rising(losses, costs, most)
    falling = _best_rising(losses[::-1], costs, most)
    return list(min(rising, (*falling[:2], falling[2][::-1]), key=lambda path: path[:2])[2])


def _best_rising(losses: Sequence[Sequence[float]], costs: Sequence[int], most: float) -> tuple[float, int, Any]:
    """(loss, cost, budgets) of the best sequence that never falls.

    Part by part, for every budget that may be the last one so far: the (cost, loss) pairs that no other one beats.
    """
    left = len(losses)
    ends: list[list[BudgetPath]] = [[(0, 0.0, ())], *[[] for _ in costs[1:]]]
    for part in losses:
        left -= 1
        grown: list[list[BudgetPath]] = []
        before: list[BudgetPath] = []
        for k, cost in enumerate(costs):
            before = _unbeaten([*before, *ends[k]])
            steps = [(spent + cost, lost + part[k], (*path, k)) for spent, lost, path in before]
            grown.append([step for step in steps if step[0] + left * cost <= most])  # the rest costs no less
        ends = grown
    return min((lost, spent, path) for paths in ends for spent, lost, path in paths)


def _unbeaten(paths: list[BudgetPath]) -> list[BudgetPath]:
    unbeaten: list[BudgetPath] = []
    for each in sorted(paths):
        if not unbeaten or each[1] < unbeaten[-1][1]:
            unbeaten.append(each)
    return unbeaten


def interpolate_linearly(at: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """y at `at`, between the two of the rising `xs` around it."""
    return float(np.interp(at, xs, ys))


def schedule_text(budgets: Sequence[int]) -> str:
    """Equal parts of [0, 1] as `budget` takes them: "4@0-0.25,16@0.25-1"; a single budget as its number."""
    runs, end = [], 0
    for num_latents, same in groupby(budgets):
        start, end = end, end + len(list(same))
        runs.append(f"{num_latents}@{start / len(budgets):g}-{end / len(budgets):g}")
    return str(budgets[0]) if len(runs) == 1 else ",".join(runs)


def main(line: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a saved model or pipeline")
    parser.add_argument("--data", required=True, help="digits, moving-digits, a folder of images or of latents")
    bound = parser.add_mutually_exclusive_group(required=True)
    bound.add_argument("--mean-share", type=float, help="limit of the mean cost, as a share of the latents")
    bound.add_argument("--mean-gflops", type=float, help="limit of the mean cost, in GFLOPs an evaluation")
    parser.add_argument("--bins", type=int, default=8, help="equal parts of [0, 1], each with a budget of its own")
    parser.add_argument("--count", type=int, default=256, help="samples, evenly spaced over the data")
    parser.add_argument("--draws", type=int, default=4, help="draws of noise for each sample")
    parser.add_argument("--vae", type=Path, help="folder of the model's autoencoder; default: the pipeline's")
    parser.add_argument("--image-size", type=int, help="size of a folder's images; default: as the model takes")
    parser.add_argument("--seed", type=int, default=0, help="seed of all noise")
    parser.add_argument("--batch-size", type=int, default=64, help="noisy samples in one forward")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="file for the result as JSON")
    args = parser.parse_args(line)
    model, vae = load_network(args.model, vae=args.vae, device=args.device)
    probe = load_probe(model, args.data, args.count, vae=vae, image_size=args.image_size, seed=args.seed)
    options = {
        name: getattr(args, name) for name in ("mean_share", "mean_gflops", "bins", "draws", "seed", "batch_size")
    }
    tuned = tune_schedule(model, probe.x, probe.y, **options)
    print(f"schedule: {tuned.schedule}")
    print(f"  {tuned.share:.1%} of the latents on average, {tuned.gflops:.4g} GFLOPs an evaluation")
    print(f"  loss {tuned.loss:.6f}; with all latents {tuned.full_loss:.6f}")
    print(f"  constant budgets: {tuned.interpolated_loss:.6f} at the same cost, interpolated;")
    print(f"  {tuned.constant_loss:.6f} with {tuned.constant} latents, the most within the limit")
    print(f"  gain over constant budgets of the same cost: {tuned.gain:.6f}")
    if args.out is not None:
        made_of = {"model": str(args.model), "data": args.data, "count": args.count}
        write_text(args.out, json.dumps({**asdict(tuned), "gain": tuned.gain, **made_of}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
