"""Costs of a replica's steps on this machine, and the ladder of settings that a sweep's table gives."""

import statistics
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from elit.budgets import evenly_spaced, resolve_budget
from elit.costs.timing import timed
from elit.evaluate.sweep import pareto_front
from elit.files import Json
from elit.flow.guidance import CFG
from elit.models.transformer import Transformer
from elit.planner.choose import Plan, Pricing, measured_plans, network_folder
from elit.planner.cost import CALL_TERMS, Costs, non_negative_prices, side_by_side
from elit.planner.profile import read_profile
from elit.planner.quality import open_quality
from elit.sampling.engine import Engine
from elit.sampling.pictures import encode_picture, sheet_frames
from elit.sampling.settings import Sampling
from elit.serve.settings import ServiceSettings

MAX_RUNGS = 12
MAX_TIME = 0.9  # A share of the next rung's time: a rung that takes more is not worth its quality.
STEPS = 3  # Steps of a measured run; the first warms up.
PRICES = ("call", "core", "around", "linear", "square")
Step = tuple[list[tuple[Sampling, int]], float]  # (setting, images) of all in progress, and milliseconds.
AGREE, ROUNDS = 0.15, 8  # Two rounds of measurement agree within this share; the most there are.


def measure_costs(engine: Engine, *, seconds: float = 1.0) -> Costs:
    """Times of steps, alone, guided, and of two together, in rounds until two agree: other work slows some."""
    budgets = engine.budgets
    measured = sorted({budgets[0], budgets[len(budgets) // 2], budgets[-1]}) if budgets else [None]
    plain = [Sampling(steps=STEPS, budget=count) for count in measured]
    cases = [[each] for each in plain]
    if "cfg" in engine.guidance_kinds:
        cases += [[replace(each, guidance=CFG(1.5))] for each in plain]
    if not engine.exact:
        cases += [*([each, each] for each in plain), [plain[0], plain[-1]]]
    running = [[(each, 1) for each in case] for case in cases]
    ms = np.full(len(cases), np.inf)
    for _ in range(ROUNDS):
        taken: list[list[float]] = [[] for _ in cases]
        ends, start, before = list[float](), time.perf_counter(), ms
        while not ends or time.perf_counter() - start < seconds:
            for case, times in zip(cases, taken, strict=True):
                steps, end = time_run(engine, case)
                times += steps
                ends.append(end / len(case))
        ms = np.array([statistics.median(times) for times in taken])
        if np.abs(ms / before - 1).max() < AGREE:
            break
    return fit_steps(Costs(separate=engine.exact, image=statistics.median(ends)), zip(running, ms, strict=True))


def fit_steps(costs: Costs, steps: Iterable[Step], slowdown: float = 1.0) -> Costs:
    """Costs with the prices that explain `steps` best; those of `costs`, `slowdown` times as high, where none tells."""
    units = [replace(costs, **Json(dict.fromkeys(PRICES, 0.0)) | {name: 1.0}) for name in PRICES]
    rows = [[unit.step_ms(running) / ms for unit in units] for running, ms in steps]
    known = np.diag([1 / (slowdown * price) if (price := getattr(costs, name)) else 0.0 for name in PRICES])
    counts, is_call = np.array([*rows, *known[known.any(1)]]), np.isin(PRICES, CALL_TERMS)
    prices = side_by_side(counts, is_call, ~is_call) if costs.overlapping else non_negative_prices(counts)
    return replace(costs, **Json(zip(PRICES, prices, strict=True)))


def time_run(engine: Engine, case: list[Sampling]) -> tuple[list[float], float]:
    """Milliseconds of the steps after the first, and of everything else: text encoder, autoencoder, files."""
    device, start = engine.network.device, time.perf_counter()
    runs = [engine.begin([engine.example], [seed], sampling) for seed, sampling in enumerate(case)]
    steps = [1e3 * timed(lambda: engine.step(runs), device)[1] for _ in range(STEPS)]
    for run in runs:
        encode_picture(sheet_frames(run.pictures(), ".png", scale=1), ".png")
    total = 1e3 * (time.perf_counter() - start)
    return steps[1:], max(0.0, total - STEPS * statistics.median(steps[1:]))


def find_ladder(
    model: Transformer, folder: Path | None, service: ServiceSettings, table: Path | None = None
) -> tuple[list[Plan], str]:
    """The ladder from a table of `elit sweep`, default in the folder of `model` or beside it, and a line about it.

    It has the settings that no other one beats in time (FLOPs without a profile) and score, and that are worth it: each
    takes at most 90% of the time of the one above, and its score is worse by at most that ratio of times squared.
    """
    quality = open_quality(model, folder and network_folder(folder), table=table)
    if quality is None:
        return [], ""
    least = resolve_budget(service.least_budget, model.budgets) if service.least_budget else None
    pricing = Pricing(model, profile=read_profile(service.profile) if service.profile else None)
    plans, kept = list[Plan](), list[int]()
    for plan in measured_plans(quality, pricing, service.guidance(model.budgets, 1.0)):
        if isinstance(plan.budget, int | None):
            num_latents = resolve_budget(plan.budget, model.budgets)
            if (num_latents or 0) >= (least or 0) and (service.least_steps or 0) <= plan.steps <= service.most_steps:
                plans.append(replace(plan, budget=num_latents))
    times = [plan.ms or plan.gflops or 0.0 for plan in plans]
    for place in reversed(pareto_front(times, [quality.loss(plan.quality or 0.0) for plan in plans])):
        if kept:
            faster = times[place] / times[kept[-1]]
            scores = sorted(plans[each].quality or 0.0 for each in (place, kept[-1]))
            if faster > MAX_TIME or 0 < scores[0] < faster**2 * scores[1]:
                continue
        kept.append(place)
    if len(kept) < 2:
        return [], ""
    rungs = [plans[place] for place in evenly_spaced(kept[::-1], MAX_RUNGS)]
    line = f"{len(rungs)} settings, the best by {quality.metric} for their {'time' if rungs[0].ms else 'FLOPs'}"
    return rungs, f"{line} in {quality.path}"
