"""Costs of a replica's steps on this machine, and the ladder of settings that a sweep's table gives."""

import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from elit.budgets import evenly_spaced, resolve_budget
from elit.costs.timing import timed
from elit.evaluate.sweep import pareto_front
from elit.files import Json
from elit.flow.guidance import CFG
from elit.models.transformer import Transformer
from elit.planner.choose import Pricing, measured_plans, network_folder
from elit.planner.cost import Costs, non_negative_prices
from elit.planner.quality import Quality, open_quality
from elit.sampling.engine import Engine
from elit.sampling.pictures import encode_picture, sheet_frames
from elit.sampling.settings import Sampling
from elit.serve.settings import Rung, ServiceSettings

MAX_RUNGS = 12
STEPS = 3  # Steps of a measured run; the first warms up.
PRICES = ("call", "core", "around", "linear", "square")


def measure_costs(engine: Engine, *, seconds: float = 4.0) -> Costs:
    """The time of steps at three budgets: of one image, guided, and of two where they are stepped together."""
    budgets = engine.budgets
    measured = sorted({budgets[0], budgets[len(budgets) // 2], budgets[-1]}) if budgets else [None]
    plain = [Sampling(steps=STEPS, budget=count) for count in measured]
    cases = [[each] for each in plain]
    if "cfg" in engine.guidance_kinds:
        cases += [[replace(each, guidance=CFG(1.5))] for each in plain]
    if not engine.exact:
        cases += [*([each, each] for each in plain), [plain[0], plain[-1]]]
    taken: list[list[float]] = [[] for _ in cases]
    ends: list[float] = []
    start = time.perf_counter()
    while not ends or time.perf_counter() - start < seconds:
        for case, times in zip(cases, taken, strict=True):
            steps, end = time_run(engine, case)
            times += steps
            ends.append(end / len(case))
    ms = [statistics.median(times) for times in taken]
    free = Costs(separate=engine.exact)
    units = [replace(free, **Json({name: 1.0})) for name in PRICES]
    counts = np.array([[unit.step_ms((each, 1) for each in case) for unit in units] for case in cases])
    prices: Json = dict(zip(PRICES, non_negative_prices(counts / np.array(ms)[:, None]), strict=True))
    return replace(free, **prices, image=statistics.median(ends))


def time_run(engine: Engine, case: list[Sampling]) -> tuple[list[float], float]:
    """Milliseconds of the steps after the first, and of everything else: text encoder, autoencoder, files."""
    device, start = engine.network.device, time.perf_counter()
    runs = [engine.begin([engine.example], [seed], sampling) for seed, sampling in enumerate(case)]
    steps = [1e3 * timed(lambda: engine.step(runs), device)[1] for _ in range(STEPS)]
    for run in runs:
        encode_picture(sheet_frames(run.pictures(), ".png", scale=1), ".png")
    total = 1e3 * (time.perf_counter() - start)
    return steps[1:], max(0.0, total - STEPS * statistics.median(steps[1:]))


def find_ladder(model: Transformer, folder: Path, service: ServiceSettings) -> tuple[tuple[Rung, ...], str]:
    """The rungs from the table of `elit sweep` in the folder of `model` or beside it, and a line about them."""
    quality = open_quality(model, network_folder(folder))
    rungs = table_ladder(model, quality, service) if quality else ()
    if not quality or not rungs:
        return (), ""
    return rungs, f"{len(rungs)} settings, the best by {quality.metric} for their FLOPs in {quality.path}"


def table_ladder(model: Transformer, quality: Quality, service: ServiceSettings) -> tuple[Rung, ...]:
    """The front of a table: settings that no other one beats in FLOPs and score; () where less than two remain."""
    least = resolve_budget(service.least_budget, model.budgets) if service.least_budget else None
    scored: list[tuple[float, float, Rung]] = []
    for plan in measured_plans(quality, Pricing(model), service.guidance(model.budgets, 1.0)):
        if not isinstance(plan.budget, int | None):
            continue
        num_latents = resolve_budget(plan.budget, model.budgets)
        if (num_latents or 0) >= (least or 0) and (service.least_steps or 0) <= plan.steps <= service.most_steps:
            scored.append((plan.gflops or 0.0, quality.loss(plan.quality or 0.0), (plan.steps, num_latents)))
    front = pareto_front([cost for cost, _, _ in scored], [loss for _, loss, _ in scored])
    rungs = tuple(scored[place][2] for place in evenly_spaced(front, MAX_RUNGS))
    return rungs if len(rungs) > 1 else ()
