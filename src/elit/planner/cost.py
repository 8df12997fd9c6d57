"""A few prices, fitted by `elit profile`: call + core · budgets + Σ (around + linear·J̃ + square·J̃²) of branches."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from elit.config import require
from elit.costs.flops import count_flops, shared_flops
from elit.files import Json
from elit.flow.guidance import Branch
from elit.models.transformer import Transformer
from elit.sampling.evaluations import sampling_plan, shares_head
from elit.sampling.settings import Sampling

CALL_TERMS, WORK_TERMS = ("call", "core"), ("around", "linear", "attention")
TERMS = ("run", "image", *CALL_TERMS, *WORK_TERMS)
"""Names of a profile's prices; those of `WORK_TERMS` are per GFLOP."""
Evaluations = Mapping[tuple[Branch, ...], int]  # how often a run evaluates each set of branches


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Prices in milliseconds."""

    run: float = 0.0  # a run of `elit.sample`
    image: float = 0.0  # an image beside its steps: noise and, in a service, decoding and writing the picture
    call: float = 0.0  # a forward, whatever is in it
    core: float = 0.0  # each different budget of a forward, whose core runs on its own
    around: float = 0.0  # a branch of an image, without the part that rises with its latents
    linear: float = 0.0  # a latent per window of a branch
    square: float = 0.0  # the same, squared: attention among the latents
    shared: float = 0.0  # the part of `around` that both branches of autoguidance compute once
    overlapping: bool = False  # calls and work go on side by side, so that the longer one counts
    separate: bool = False  # every image has a forward of its own, so that its bytes do not depend on the batch

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(0 <= value < float("inf"), name, value, "milliseconds, 0 or more")

    @classmethod
    def from_prices(cls, prices: Mapping[str, float], anatomy: Json, *, overlapping: bool = False) -> "Costs":
        parts = {"around": "around", "linear": "linear", "square": "attention", "shared": "around"}
        own: Json = {name: prices[name] for name in ("run", "image", *CALL_TERMS)}
        own |= {name: prices[price] * ({"shared": 0.0} | anatomy)[name] for name, price in parts.items()}
        return cls(**own, overlapping=overlapping)

    def work(self, latents: Iterable[int], *, shared: bool = False) -> float:
        """Work of one image in one evaluation. latents: of its branches. shared: they differ only after Read."""
        total = sum(self.around + self.linear * count + self.square * count**2 for count in latents)
        return total - self.shared if shared else total

    def evaluation(self, latents: Collection[int], work: float) -> float:
        """One forward. latents: the different ones in it."""
        calls = self.call + self.core * len(latents)
        return max(calls, work) if self.overlapping else calls + work

    def run_ms(self, evaluations: Evaluations, batch: int) -> float:
        """A run of `elit.sample` of `batch` images."""
        total = self.run + batch * self.image
        for branches, times in evaluations.items():
            latents = [branch.budget or 0 for branch in branches]
            work = self.work(latents, shared=shares_head(branches))
            total += times * self.evaluation(set(latents), batch * work)
        return total

    def step_ms(self, running: Iterable[tuple[Sampling, int]]) -> float:
        """One step of a service: (setting, images) of each request in progress."""
        steps = [(branch_latents(sampling), images) for sampling, images in running]
        if self.separate:
            return sum(images * self.evaluation(set(latents), self.work(latents)) for latents, images in steps)
        different = set[int]().union(*(latents for latents, _ in steps))
        work = sum(images * self.work(latents) for latents, images in steps)
        return self.evaluation(different, work) if steps else 0.0

    def alone_ms(self, sampling: Sampling, images: int = 1) -> float:
        """A whole request of a service with nothing beside it."""
        return sampling.steps * self.step_ms([(sampling, images)]) + images * self.image

    def rate(self, sampling: Sampling, batch: int) -> float:
        """Images a second with `batch` of them always in progress."""
        return 1e3 * batch / self.alone_ms(sampling, batch)

    def efficient_batch(self, sampling: Sampling, most: int) -> int:
        """The fewest images in progress that reach 90% of the best rate; more of them only make all wait."""
        rates = [self.rate(sampling, batch) for batch in range(1, most + 1)]
        return next(batch for batch, rate in enumerate(rates, 1) if rate >= 0.9 * max(rates))


@lru_cache(4096)
def branch_latents(sampling: Sampling) -> tuple[int, ...]:
    """Latents per window of every branch of a step, where the budgets are numbers; 0 without an interface."""
    main: Any = sampling.budget or 0
    guidance = sampling.guidance
    if guidance is None or guidance.scale == 1:
        return (main,)
    weak: Any = guidance.budget or main
    return (main, weak)


def evaluations_of(model: Transformer, sampling: Sampling) -> Evaluations:
    plan = sampling_plan(model, sampling)
    return Counter(tuple(branches) for step in plan for branches in step.values() if branches)


def anatomy(model: Transformer) -> Json:
    """GFLOPs of a forward of one image as a polynomial in the latents of a window, and the budgets it is for."""
    budgets = model.budgets
    known = sorted({budgets[0], budgets[len(budgets) // 2], budgets[-1]}) if budgets else [0]
    flops = [count_flops(model, budget=num_latents or None) / 1e9 for num_latents in known]
    solved = np.linalg.solve(np.vander(np.array(known, dtype=np.float64), increasing=True), flops).tolist()
    around, linear, square = [*solved, 0.0, 0.0][:3]
    parts = {"around": around, "linear": linear, "square": square, "shared": shared_flops(model) / 1e9}
    return parts | {"budgets": list(budgets)}


Run = tuple[Evaluations, int]  # a run's evaluations and its number of images


def fit(runs: Sequence[Run], ms: Sequence[float], anatomy: Json) -> tuple[dict[str, float], bool]:
    """Prices with the least squared relative error, none below 0, and whether calls and work overlap."""
    nothing = dict.fromkeys(TERMS, 0.0)
    units = [Costs.from_prices(nothing | {name: 1.0}, anatomy) for name in TERMS]
    counts = np.array([[unit.run_ms(*run) for unit in units] for run in runs]) / np.array(ms)[:, None]
    is_call, is_work = np.isin(TERMS, CALL_TERMS), np.isin(TERMS, WORK_TERMS)
    one_by_one, together = non_negative_prices(counts), side_by_side(counts, is_call, is_work)
    forms = [(dict(zip(TERMS, one_by_one, strict=True)), False), (dict(zip(TERMS, together, strict=True)), True)]
    return min(forms, key=lambda form: mean_error(Costs.from_prices(form[0], anatomy, overlapping=form[1]), runs, ms))


def side_by_side(counts: np.ndarray, is_call: np.ndarray, is_work: np.ndarray) -> list[float]:
    """The prices where the longer of calls and work is what a run takes."""
    prices = non_negative_prices(counts)
    for _ in range(8):  # the runs that wait for calls depend on the prices, and the prices on those runs
        waiting = (counts * is_call) @ prices > (counts * is_work) @ prices
        prices = non_negative_prices(np.where(np.where(waiting[:, None], is_work, is_call), 0.0, counts))
    return prices


def mean_error(costs: Costs, runs: Sequence[Run], ms: Sequence[float]) -> float:
    return sum(abs(costs.run_ms(*run) / taken - 1) for run, taken in zip(runs, ms, strict=True)) / len(runs)


def non_negative_prices(relative: np.ndarray) -> list[float]:
    """x >= 0 with the least |relative·x − 1|², for (N, K) counts over measured times."""
    from scipy.optimize import nnls  # 0.3 s, which a plan by a stored profile does without

    scale = np.abs(relative).max(0)
    scale[scale == 0] = 1.0  # prices differ by many powers of ten
    return (nnls(relative / scale, np.ones(len(relative)), maxiter=1000)[0] / scale).tolist()
