"""Wall-clock against FLOPs at every budget, beside the plain DiT of the same size and the machine's measured peak.

`time/FLOPs` is time(J̃)/time(full) over FLOPs(J̃)/FLOPs(full): 1 where the dial saves all that it should. Utilisation
is the closed form's FLOP/s over those of a large matrix product, which takes its turn in the same rounds.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from subjects import TrainingStep, evenly, inference, inputs, network
from timing import Run, matrix_product, peak_bytes, take_turns

import elit
from elit.models.transformer import Transformer

Case = tuple[str, int | None]
PEAK: Case = ("matrix product", None)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", default=["S", "B"], metavar="SIZE", help="of S, B, L, XL")
    parser.add_argument("--sample-sizes", nargs="+", type=int, default=[32, 64], help="32 is 256px, 64 is 512px")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--budgets", type=int, default=16, help="how many are measured, from the smallest to all")
    parser.add_argument("--matrix", type=int, help="rows of the large matrix; default 2048, on a GPU 8192")


def forward(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A forward without gradients."""

    def make(name: str, sample_size: int) -> tuple[Transformer, Callable]:
        model = inference(name, sample_size, args)
        return model, partial(without_gradients, model, inputs(model, args.batch_size))

    return measure(args, make, 1)


def without_gradients(model: Any, batch: tuple, budget: int | list[int] | None) -> None:
    with torch.no_grad():
        model(*batch, budget)


def training(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Forward, backward and Adam; three times the FLOPs of a forward, and the memory at its peak."""

    def make(name: str, sample_size: int) -> tuple[Transformer, Callable]:
        model = network(name, sample_size, args)
        return model, TrainingStep(model, inputs(model, args.batch_size), args)

    return measure(args, make, 3)


def measure(args: argparse.Namespace, make: Callable, passes: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows, and what they come to; make(name, sample size) -> a network, and what runs it at a budget."""
    rows, settings = [], []
    for size in args.sizes:
        for sample_size in args.sample_sizes:
            of_size, peak = one_size(size, sample_size, args, make, passes)
            rows += of_size
            plain, full = of_size[:2]
            over_plain = {"time": full["ms"] / plain["ms"], "flops": full["gflops"] / plain["gflops"]}
            place = {"size": size, "sample_size": sample_size, "peak_gflops_per_s": peak / 1e9}
            settings.append(place | {"full_over_plain": over_plain})
    worst = max((row for row in rows if row["budget"]), key=lambda row: row["time_over_flops"])
    named = {key: worst[key] for key in ("model", "sample_size", "budget", "time_over_flops")}
    return rows, {"worst": named, "settings": settings}


def one_size(
    size: str, sample_size: int, args: argparse.Namespace, make: Callable, passes: int
) -> tuple[list[dict[str, Any]], float]:
    """Rows, the plain DiT's first, then ELIT's from its full budget down; and the peak in FLOP/s."""
    models: dict[str, Transformer] = {}
    cases: dict[Case, Run] = {}
    steps = {}
    for name in (f"DiT-{size}/2", f"ELIT-DiT-{size}/2"):
        models[name], steps[name] = make(name, sample_size)
        budgets: list[int | None] = [*evenly(models[name].budgets, args.budgets)]
        for budget in budgets or [None]:
            cases[name, budget] = partial(steps[name], budget)
    rows_of_matrix = args.matrix or (8192 if args.device.type == "cuda" else 2048)
    cases[PEAK], product_flops = matrix_product(rows_of_matrix, args.device, args.dtype)
    times = take_turns(cases, args.rounds, args.device)
    peak = product_flops / times.pop(PEAK).median

    full: Case = (name, models[name].budgets[-1])
    full_flops = elit.count_flops(models[name])
    rows = []
    for name, budget in times:
        seconds, spread = times[name, budget]
        flops = elit.count_flops(models[name], budget=budget)
        time_share, flops_share = seconds / times[full].median, flops / full_flops
        speed = passes * args.batch_size * flops / seconds
        row = {
            "model": name,
            "sample_size": sample_size,
            "budget": budget,
            "ms": 1e3 * seconds,
            "spread": spread,
            "gflops": passes * args.batch_size * flops / 1e9,
            "time": time_share,
            "flops": flops_share,
            "time_over_flops": time_share / flops_share,
            "utilisation": speed / peak,
        }
        if passes == 3:
            row["peak_mib"] = (steps[name].resident_bytes + peak_bytes(cases[name, budget], args.device)) / 2**20
        rows.append(row)
    return rows, peak


def says(summary: dict[str, Any]) -> list[str]:
    worst = summary["worst"]
    where = f"{worst['model']} at {worst['sample_size']}, {worst['budget']} latents a window"
    return [
        f"worst time/FLOPs: {worst['time_over_flops']:.3f} ({where})",
        *(
            f"{one['size']}/2 at {one['sample_size']}: full budget over plain DiT "
            f"{one['full_over_plain']['time']:.3f} × the time, {one['full_over_plain']['flops']:.3f} × the FLOPs; "
            f"measured peak {one['peak_gflops_per_s']:.4g} GFLOP/s"
            for one in summary["settings"]
        ),
    ]
