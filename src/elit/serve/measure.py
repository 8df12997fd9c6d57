"""A replica made ready: its engine on this machine, and its costs from a profile or measured now."""

import statistics
import time
from dataclasses import replace

import numpy as np
import torch

from elit.costs.timing import timed
from elit.elastic.engine import load_engine
from elit.files import Json
from elit.flow.guidance import CFG
from elit.planner.choose import find_profile, network_folder
from elit.planner.cost import Costs, non_negative_prices
from elit.planner.profile import read_profile
from elit.pretrained import measurements_folder, model_folder
from elit.sampling.engine import Engine, NetworkEngine
from elit.sampling.settings import Sampling
from elit.serve.replica import Replica, encode
from elit.serve.settings import ServiceSettings

STEPS = 3
"""Steps of a measured run; the first warms up."""
PRICES = ("call", "core", "around", "linear", "square")


def load_replica(service: ServiceSettings, name: str = "0") -> Replica:
    """Raises ValueError for a model that cannot be loaded, or makes no pictures."""
    if service.threads:
        torch.set_num_threads(service.threads)
    device = service.device or "cpu"
    engine = load_engine(
        model_folder(service.model),
        device=device,
        dtype=service.dtype,
        compile=service.compile,
        exact=device == "cpu" if service.exact is None else service.exact,
        size=service.pixels(),
    )
    costs = read_profile(service.profile).costs() if service.profile else None
    if isinstance(engine, NetworkEngine):
        if len(engine.network.sample_size) != 2 or not engine.makes_pictures:
            raise ValueError(f"cannot serve {str(service.model)!r}: it makes no pictures")
        folder = network_folder(model_folder(service.model))
        profile = find_profile(engine.network, folder and measurements_folder(folder), compile=service.compile)
        costs = costs or (profile.costs() if profile is not None and profile.anatomy else None)
    return Replica(engine, costs or measure_costs(engine), service, name)


def measure_costs(engine: Engine, *, seconds: float = 4.0) -> Costs:
    """The time of steps at three budgets: of one image, guided, and of two where they are stepped together."""
    budgets = engine.budgets
    measured = sorted({budgets[0], budgets[len(budgets) // 2], budgets[-1]}) if budgets else [None]
    plain = [Sampling(steps=STEPS, budget=count) for count in measured]
    cases = [[each] for each in plain]
    if "cfg" in engine.guidance_kinds:
        cases += [[Sampling(steps=STEPS, budget=count, guidance=CFG(1.5))] for count in measured]
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
        encode(run.pictures(), "png")
    total = 1e3 * (time.perf_counter() - start)
    return steps[1:], max(0.0, total - STEPS * statistics.median(steps[1:]))
