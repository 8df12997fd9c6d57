"""The compute–quality plane: the points of a sweep, which of them are worth their cost, what a smaller budget loses.

Pure functions of numbers; `sweep.py` measures the points.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from elit.evaluate.score import DISTANCES


@dataclass(frozen=True, kw_only=True)
class Point:
    """One setting under one detector."""

    budget: str
    """Latents per group, or the schedule if it changes over the steps; "all" for a network without an interface."""
    share: float
    """Of the latents, mean over the steps."""
    steps: int
    guidance: str
    """none, cfg, ag or ccfg."""
    scale: float
    """Guidance scale; 1 without guidance."""
    guidance_budget: int | None
    """Latents per group of the second branch of ag and ccfg."""
    count: int
    """Samples."""
    gflops: float
    """Of a sample, all steps and both branches, without the autoencoder."""
    ms: float
    """Likewise, in the fastest chunk."""
    saturation: float
    """Mean over the samples; `metrics.saturation`."""
    detector: str
    """Its specification."""
    recipe_sha256: str
    """Of everything that decides the scores."""
    file: str
    """The stored score with that recipe, in the sweep's folder."""
    cache: float = 0.0
    """Threshold of step caching; 0 is off."""
    calls: int | None = None
    """Steps that ask the network; with a cache fewer than `steps`."""
    solver: str = "euler"
    shift: float = 1.0
    guidance_low: float = 0.0
    """Times between which guidance acts, 0 … 1 without guidance."""
    guidance_high: float = 1.0
    model_sha256: str = ""
    """Of the network's class, settings and weights, as the recipe has them."""
    scores: dict[str, float] = field(default_factory=dict)
    """By metric."""

    @property
    def scheduled(self) -> bool:
        return not self.budget.isdigit() and self.budget != "all"

    def row(self) -> dict[str, Any]:
        """Of the results table: flat, a column a metric."""
        flat = asdict(self)
        return flat | flat.pop("scores")


def loss(metric: str, value: float) -> float:
    """Lower is better, whatever the metric."""
    return value if metric in DISTANCES else -value


def best(points: Iterable[Point], metric: str) -> Point:
    """The one with the best score; of equal ones the first."""
    return min(points, key=lambda point: loss(metric, point.scores[metric]))


def pareto_front(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Which points no other one beats, by rising cost: their indices (the envelope of paper Figures 1, 8 and 14).

    A point is beaten by one that is no worse in both, and better in one. Points that are equal in both do not beat
    each other: all of them are on the front, in their order. Raises ValueError for numbers that are not finite.
    """
    if not all(map(math.isfinite, [*costs, *losses])):
        raise ValueError("pareto_front: costs and losses must be finite numbers")
    front: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], losses[i])):
        last = front[-1] if front else None
        if last is None or losses[i] < losses[last] or (costs[i], losses[i]) == (costs[last], losses[last]):
            front.append(i)
    return front


def front_of(points: Sequence[Point], metric: str, cost: str) -> list[Point]:
    """The points on the front of `metric` against `cost`, gflops or ms; by rising cost."""
    losses = [loss(metric, point.scores[metric]) for point in points]
    return [points[i] for i in pareto_front([getattr(point, cost) for point in points], losses)]


def degradation(metric: str, at_budget: float, at_full: float) -> float | None:
    """ρ, what a budget loses (paper Table 5): 1 is nothing, 2 is twice as bad, below 1 is better than the full budget.

    Of a distance Q(J̃) / Q(J), of a metric that rises with quality Q(J) / Q(J̃), where all else is equal: steps, guidance
    and scale. None where a score is not above 0, as KID's unbiased estimate may be: there is no ratio then.
    """
    if min(at_budget, at_full) <= 0:
        return None
    return at_budget / at_full if metric in DISTANCES else at_full / at_budget


def degradations(points: Sequence[Point], metric: str) -> list[tuple[Point, float]]:
    """(point, ρ) for every point whose full budget (share 1) is among `points` with all else equal, and ρ exists."""
    full = {_all_but_budget(point): point.scores[metric] for point in points if point.share == 1}
    ratios = []
    for point in points:
        whole = full.get(_all_but_budget(point))
        rho = None if whole is None else degradation(metric, point.scores[metric], whole)
        if rho is not None:
            ratios.append((point, rho))
    return ratios


def _all_but_budget(point: Point) -> tuple[Any, ...]:
    fixed = point.steps, point.cache, point.count, point.detector
    return *fixed, point.guidance, point.scale, point.guidance_budget
