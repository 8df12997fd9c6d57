"""Milliseconds of a sampling run from what it does: a few terms with a price each, fitted to measured runs.

What a run does is counted in `TERMS`; its time is the sum of counts × prices. Where a device takes the work while the
next calls are still on their way to it, as a GPU does, the longer of the two counts instead, step by step.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from elit.budgets import Schedule
from elit.costs.flops import count_flops, shared_flops
from elit.flow.guidance import Branch, Guidance
from elit.flow.solver import time_grid
from elit.models.transformer import Transformer
from elit.sampling.evaluations import sampling_plan, shares_head

RUN_TERMS = ("run", "image")
"""Once a run; once an image, whose noise is drawn from its own seed."""
CALL_TERMS = ("call", "core")
"""Once an evaluation of the network; once for each different budget in it, whose core runs on its own."""
WORK_TERMS = ("around", "linear", "attention")
"""GFLOPs outside of the core; those that rise with the latents; those that rise with their square."""
TERMS = (*RUN_TERMS, *CALL_TERMS, *WORK_TERMS)


@dataclass(frozen=True)
class Counts:
    """What a run of `batch` images does."""

    batch: int
    evaluations: tuple[tuple[int, tuple[float, ...], tuple[float, ...]], ...]
    """How often, and of one of them the counts of `CALL_TERMS` and of `WORK_TERMS`."""

    @property
    def gflops(self) -> float:
        """Of one image."""
        return sum(times * sum(work) for times, _, work in self.evaluations) / self.batch

    def row(self, launch_bound: bool | None = None) -> list[float]:
        """Counts of all `TERMS`; launch_bound: leave out the work, or the calls if False."""
        total = [1.0, float(self.batch), *[0.0] * (len(CALL_TERMS) + len(WORK_TERMS))]
        for times, calls, work in self.evaluations:
            parts = ((calls, launch_bound is not False), (work, launch_bound is not True))
            counts = [count * used for part, used in parts for count in part]
            total[2:] = [before + times * count for before, count in zip(total[2:], counts, strict=True)]
        return total


class CostPolynomial:
    """A network's cost as a polynomial in the latents of a group, from the closed form."""

    def __init__(self, model: Transformer):
        self.model = model
        self.shared = shared_flops(model) / 1e9
        budgets = model.budgets
        known = sorted({budgets[0], budgets[len(budgets) // 2], budgets[-1]}) if budgets else [0]
        costs = [count_flops(model, budget=num_latents or None) / 1e9 for num_latents in known]
        coefficients = np.linalg.solve(np.vander(np.array(known, dtype=np.float64), increasing=True), costs).tolist()
        self.around, self.linear, self.square = [*coefficients, 0.0, 0.0][:3]

    def parts(self) -> dict[str, Any]:
        """The polynomial's coefficients in GFLOPs, and the budgets it is for."""
        parts = {"around": self.around, "linear": self.linear, "square": self.square, "shared": self.shared}
        return parts | {"budgets": list(self.model.budgets)}

    def counts(
        self,
        *,
        batch: int = 1,
        steps: int,
        budget: Schedule = None,
        guidance: Guidance | None = None,
        cache: float = 0.0,
    ) -> Counts:
        """What `elit.sample` does at these settings. Raises ValueError for those that do not fit the network."""
        plan = sampling_plan(self.model, time_grid(steps), budget, guidance, cache=cache)
        seen = Counter(tuple(branches) for step in plan for branches in step.values() if branches)
        return Counts(batch, tuple((times, *self._evaluation(batch, branches)) for branches, times in seen.items()))

    def _evaluation(self, batch: int, branches: Sequence[Branch]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        counts = [branch.budget or 0 for branch in branches]
        around = len(branches) * self.around - (self.shared if shares_head(branches) else 0.0)
        work = (around, self.linear * sum(counts), self.square * sum(count**2 for count in counts))
        return (1.0, float(len(set(counts)))), tuple(batch * part for part in work)


@dataclass(frozen=True)
class CostModel:
    """Prices in milliseconds, one a term."""

    prices: dict[str, float]
    overlapping: bool
    """Whether calls and work go on side by side, so that the longer one counts."""

    def ms(self, counts: Counts) -> float:
        """Predicted wall-clock of a run."""
        prices = [self.prices[name] for name in TERMS]
        once, call, work = prices[:2], prices[2:4], prices[4:]
        total = _dot(once, (1.0, counts.batch))
        for times, calls, done in counts.evaluations:
            both = _dot(call, calls), _dot(work, done)
            total += times * (max(both) if self.overlapping else sum(both))
        return total

    def error(self, runs: Sequence[Counts], ms: Sequence[float]) -> float:
        """Mean relative error."""
        return sum(abs(self.ms(run) / taken - 1) for run, taken in zip(runs, ms, strict=True)) / len(runs)


def fit(runs: Sequence[Counts], ms: Sequence[float]) -> CostModel:
    """The cost model with the least squared relative error, no price below 0; of its two forms the better one."""
    one_by_one = _priced([run.row() for run in runs], ms, overlapping=False)
    side_by_side = one_by_one
    for _ in range(8):  # which runs wait for calls depends on the prices, and they on that
        sides = [_launch_bound(side_by_side, run) for run in runs]
        rows = [run.row(side) for run, side in zip(runs, sides, strict=True)]
        side_by_side = _priced(rows, ms, overlapping=True)
    return min((one_by_one, side_by_side), key=lambda model: model.error(runs, ms))


def _launch_bound(model: CostModel, run: Counts) -> bool:
    """Whether most of a run's time goes by with calls, not with work."""
    prices = [model.prices[name] for name in TERMS]
    calls = sum(times * _dot(prices[2:4], calls) for times, calls, _ in run.evaluations)
    return calls > sum(times * _dot(prices[4:], work) for times, _, work in run.evaluations)


def _priced(rows: Sequence[Sequence[float]], ms: Sequence[float], *, overlapping: bool) -> CostModel:
    relative = np.array(rows, dtype=np.float64) / np.array(ms, dtype=np.float64)[:, None]
    return CostModel(dict(zip(TERMS, non_negative_prices(relative), strict=True)), overlapping)


def non_negative_prices(relative: np.ndarray) -> list[float]:
    """x >= 0 with the least |relative·x − 1|², for (N, K) counts over measured times."""
    from scipy.optimize import nnls  # 0.3 s, which a plan by a stored profile does without

    scale = np.abs(relative).max(0)
    scale[scale == 0] = 1.0  # prices differ by many powers of ten
    return (nnls(relative / scale, np.ones(len(relative)))[0] / scale).tolist()


def _dot(prices: Sequence[float], counts: Sequence[float]) -> float:
    return sum(price * count for price, count in zip(prices, counts, strict=True))
