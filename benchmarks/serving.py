"""An elastic service against others, on one trace: measured on this machine, and simulated for it and for 8 of it.

    python benchmarks/serving.py --threads 1 --sweep TABLE --out benchmarks/results/serving.json   # 4 minutes
    python benchmarks/serving.py --simulate-only

What is measured is the replica itself (queue, policy, engine) under an open loop of requests in this process, without
HTTP and Ray; `elit loadtest` measures those too. The trace is bursty, `--load` times what full quality sustains.

    elastic        the ladder of the sweep's table or, without one, that of the next
    by rule        fewer latents, then fewer steps
    full           full quality, first come first served, nothing refused before the queue is full
    low            the least budget always
    fewer steps    the same policy, full budget, steps in the place of latents
    shedding       full quality or refused at once
"""

import argparse
import asyncio
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from simulator import FOR_EVER, bursty_rates, simulate

import elit
from elit.budgets import evenly_spaced, resolve_budget
from elit.elastic.engine import load_engine
from elit.evaluate.tables import print_table
from elit.files import Json, write_text
from elit.planner.cost import Costs
from elit.planner.quality import Curve, read_quality
from elit.pretrained import model_folder
from elit.sampling.engine import Engine
from elit.sampling.settings import Sampling
from elit.serve.ladder import find_ladder, measure_costs
from elit.serve.loadtest import Outcome, arrivals, summarize
from elit.serve.policy import PolicySettings
from elit.serve.replica import Replica
from elit.serve.requests import Request
from elit.serve.settings import STEPS, ServiceSettings

PIECES = 10


def systems(service: ServiceSettings, budgets: Sequence[int]) -> dict[str, tuple[tuple[Sampling, ...], bool]]:
    """Each system's ladder, and whether its requests are patient: served late, not refused."""
    elastic, by_rule = service.ladder(budgets), replace(service, rungs=()).ladder(budgets)
    full, low = elastic[-1], replace(elastic[-1], budget=budgets[0] if budgets else None)
    counts = range(max(1, full.steps // 4), full.steps + 1)
    steps = tuple(replace(full, steps=count) for count in evenly_spaced(counts, len(by_rule)))
    return {
        "elastic": (elastic, False),
        "by rule": (by_rule, False),
        "full": ((full,), True),
        "low": ((low,), False),
        "fewer steps": (steps, False),
        "shedding": ((full,), False),
    }


async def measure(
    engine: Engine,
    costs: Costs,
    service: ServiceSettings,
    ladder: Sequence[Sampling],
    times: Sequence[float],
    *,
    patient: bool,
) -> list[Outcome]:
    """Outcomes of requests that arrive at `times` at a replica in this process."""
    rungs: Any = [(each.steps, each.budget) for each in ladder]
    replica = Replica(engine, costs, replace(service, steps=ladder[-1].steps, rungs=rungs))
    start = time.time()

    async def send(place: int, at: float) -> Outcome:
        await asyncio.sleep(max(0.0, start + at - time.time()))
        now = time.time()
        due = now + service.deadline_ms / 1e3
        last = now + FOR_EVER if patient else due
        request = Request(
            id=str(place), prompt=str(place % 10), arrival=now, deadline=last, settings=tuple(ladder), seeds=(place,)
        )
        answer = await replica.generate(request)
        arrived: Json = {"arrival": now - start, "deadline": due - start}
        if "images" not in answer:
            return Outcome(**arrived, status=429)
        return Outcome(**arrived, finish=time.time() - start, budget=answer["budget"], steps=answer["steps"])

    return list(await asyncio.gather(*(send(place, at) for place, at in enumerate(times))))


def quality_of(path: Path | None, budgets: Sequence[int]) -> tuple[str, Callable[[Outcome], float] | None]:
    """The metric of a sweep's table, and its value at an outcome's budget and steps, without guidance.

    Between measured budgets and steps it is linear in their logarithms; beyond them that of the nearest. None without
    a table. Raises ValueError where the table has nothing without guidance.
    """
    if path is None:
        return "", None
    table = read_quality(path)
    curves: dict[int, Curve] = {}
    for curve in table.curves:
        schedule = curve.setting.budget
        if curve.setting.guidance is not None or curve.setting.cache:
            continue
        if schedule is None or isinstance(schedule, int | float) or (isinstance(schedule, str) and "@" not in schedule):
            curves[resolve_budget(schedule, budgets) or 0] = curve
    if not curves:
        raise ValueError(f"sweep={str(path)!r}: has no scores without guidance")
    measured = sorted(curves)

    def quality(outcome: Outcome) -> float:
        values = []
        for budget in measured:
            steps = curves[budget].steps
            values.append(curves[budget].at(min(max(outcome.steps or steps[-1], steps[0]), steps[-1])) or 0.0)
        return float(np.interp(np.log(outcome.budget or measured[-1]), np.log(measured), values))

    return table.metric, quality


def summarize_all(outcomes: Sequence[Outcome], quality: Callable[[Outcome], float] | None) -> Json:
    """The summary of a load test, and the mean quality of the served."""
    scores = [quality(each) for each in outcomes if each.finish is not None] if quality else []
    return summarize(outcomes) | ({"mean_quality": float(np.mean(scores)) if scores else None} if quality else {})


def over_time(
    outcomes: Sequence[Outcome], bins: int, quality: Callable[[Outcome], float] | None
) -> list[dict[str, float | None]]:
    """Load, budget, latency, violations and quality in even pieces of the run, by arrival."""
    width = max(max(each.arrival for each in outcomes) / bins, 1e-9)
    names = {"budget": "mean_budget", "p50_ms": "p50_ms", "violations": "violations", "quality": "mean_quality"}
    rows = []
    for number in range(bins):
        here = [each for each in outcomes if number == min(bins - 1, int(each.arrival / width))]
        summary = summarize_all(here, quality)
        values = {name: summary.get(source) for name, source in names.items()}
        rows.append({"at": (number + 0.5) * width, "rate": len(here) / width} | values)
    return rows


def plot(runs: dict[str, list[Outcome]], path: Path, metric: str, quality: Callable[[Outcome], float] | None) -> None:
    """Load, budget, latency, violations and, with a sweep's table, quality over time, a line a system."""
    from elit.evaluate.plots import new_figure

    count = 5 if quality else 4
    with new_figure(path, 9, 2.25 * count) as figure:
        axes = figure.subplots(count, 1, sharex=True)
        for number, (name, outcomes) in enumerate(runs.items()):
            rows = over_time(outcomes, 40, quality)
            at = [row["at"] for row in rows]
            for ax, key in zip(axes[1:], ("budget", "p50_ms", "violations", "quality")[: count - 1], strict=True):
                ax.plot(at, [float("nan") if row[key] is None else row[key] for row in rows], label=name)
            if number == 0:
                axes[0].plot(at, [row["rate"] for row in rows], color="#667085")
        labels = ("requests a second", "latents per window", "median latency, ms", "violations", metric)
        for ax, label in zip(axes, labels[:count], strict=True):
            ax.set_ylabel(label)
            ax.grid(alpha=0.25)
        for ax in (axes[0], axes[1], axes[3]):
            ax.set_ylim(bottom=0)
        axes[2].set_yscale("log")
        axes[-1].set_xlabel("seconds")
        figure.legend(*axes[1].get_legend_handles_labels(), loc="outside upper center", frameon=False, ncols=len(runs))


def parse(line: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion")
    parser.add_argument("--steps", type=int, help="at full quality; default: as many as score best in the table, or 20")
    parser.add_argument("--least-budget", default="", help="floor of the elastic ladders")
    parser.add_argument(
        "--seconds", type=int, default=40, help="of the trace, which every measured system runs through"
    )
    parser.add_argument("--load", type=float, default=2.0, help="times what full quality sustains, in the mean")
    parser.add_argument("--patience", type=float, default=10.0, help="deadline, times a lone image at full quality")
    parser.add_argument("--max-batch", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--sweep", type=Path, help="table of elit sweep: mean quality of what was served")
    parser.add_argument(
        "--systems", nargs="+", default=["elastic", "by rule", "full", "low", "fewer steps", "shedding"]
    )
    parser.add_argument("--simulate-only", action="store_true")
    parser.add_argument("--out", type=Path, help="results as JSON, and plots beside it")
    return parser.parse_args(line)


def main(line: Sequence[str] | None = None) -> int:
    args = parse(line)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = load_engine(model_folder(args.model), device=device, exact=device == "cpu")
    load_before = os.getloadavg()[0]
    costs = measure_costs(engine, seconds=min(6.0, args.seconds / 5))
    limits = {"least_budget": args.least_budget, "max_batch": args.max_batch, "max_queue": 64}
    service = ServiceSettings(model=Path(args.model), steps=args.steps or STEPS, **limits)
    plans = find_ladder(engine.network, None, service, args.sweep)[0] if args.sweep and not args.steps else []
    if plans:
        rungs: Any = tuple((each.steps, each.budget) for each in plans)
        service = replace(service, steps=rungs[-1][0], rungs=rungs)
    ladder = service.ladder(engine.budgets)
    slots = Replica(engine, costs, service).policy.settings.slots
    capacity = costs.rate(ladder[-1], slots)
    deadline_ms = args.patience * costs.alone_ms(ladder[-1])
    service = replace(service, max_batch=slots, deadline_ms=deadline_ms)
    metric, quality = quality_of(args.sweep, engine.budgets)
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"load {load_before:.1f} before; full quality {costs.alone_ms(ladder[-1]):.0f} ms, {capacity:.2f} images/s; "
        f"floor {costs.rate(ladder[0], slots):.2f} images/s; deadline {deadline_ms:.0f} ms; {slots} in progress"
    )
    trace = arrivals(bursty_rates(args.seconds, args.load * capacity, args.seed), args.seed)
    rows: list[dict[str, Any]] = []
    measured: dict[str, list[Outcome]] = {}
    simulated: dict[str, list[Outcome]] = {}

    def record(kind: str, name: str, outcomes: list[Outcome]) -> None:
        rows.append({"run": kind, "system": name, **summarize_all(outcomes, quality)})

    own = PolicySettings(slots=slots, max_queue=service.max_queue)
    for name, (rungs, patient) in systems(service, engine.budgets).items():
        simulated[name] = simulate(trace, rungs, costs, own, deadline_ms=deadline_ms, patient=patient)
        record("simulated", name, simulated[name])
        if name in args.systems and not args.simulate_only:
            measured[name] = asyncio.run(measure(engine, costs, service, rungs, trace, patient=patient))
            record("measured", name, measured[name])
    eight = arrivals(bursty_rates(args.seconds, 8 * args.load * capacity, args.seed), args.seed)
    for name, (rungs, patient) in systems(service, engine.budgets).items():
        outcomes = simulate(eight, rungs, costs, own, deadline_ms=deadline_ms, patient=patient, replicas=8)
        record("simulated × 8", name, outcomes)
    columns = list(rows[0])
    cells = [[f"{row[key]:.3g}" if isinstance(row[key], float) else str(row[key]) for key in columns] for row in rows]
    print_table(columns, cells)
    if quality:
        at_once = measured or simulated
        pieces = {name: over_time(outcomes, PIECES, quality) for name, outcomes in at_once.items()}
        kind = "measured" if measured else "simulated"
        title = f"{metric} of what was served, {kind}, in {PIECES} even pieces of the trace"
        head = ["system", *(f"{row['at']:.0f} s" for row in next(iter(pieces.values())))]
        print_table(
            head,
            [
                [name, *("" if row["quality"] is None else f"{row['quality']:.3g}" for row in rows)]
                for name, rows in pieces.items()
            ],
            title=title,
        )
    if args.out:
        summary = {
            "command": " ".join(["python", "benchmarks/serving.py", *(line or sys.argv[1:])]),
            "metric": metric,
            "versions": {"elit": elit.__version__, "torch": torch.__version__},
            "load_before": load_before,
            "load_after": os.getloadavg()[0],
            "costs": vars(costs),
            "deadline_ms": deadline_ms,
            "capacity": capacity,
        }
        write_text(args.out, json.dumps(summary | {"rows": rows}, indent=1) + "\n")
        for kind, runs in (("measured", measured), ("simulated", simulated)):
            if runs:
                plot(runs, args.out.with_name(f"{args.out.stem}-{kind}.png"), metric, quality)
    return 0


if __name__ == "__main__":
    sys.exit(main())
