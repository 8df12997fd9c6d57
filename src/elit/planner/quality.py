"""Quality measured by a sweep: a curve over steps for each budget, guidance and cache."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from elit.evaluate.plane import loss, read_table
from elit.evaluate.score import METRICS
from elit.pretrained import measurements_folder
from elit.sampling.settings import Sampling

NAMES = ("sweep.jsonl", "sweep.parquet")


@dataclass(frozen=True)
class Curve:
    """Settings that differ in their steps alone."""

    setting: Sampling
    """All but its steps."""
    steps: tuple[int, ...]
    """Measured, ascending."""
    values: tuple[float, ...]
    """The metric there."""

    def sampling(self, steps: int) -> Sampling:
        return replace(self.setting, steps=steps)

    def at(self, steps: int) -> float | None:
        """The metric at `steps`: linear in log(steps) between the measured ones, None beyond them."""
        if not self.steps[0] <= steps <= self.steps[-1]:
            return None
        return float(np.interp(math.log(steps), np.log(self.steps), self.values))

    def origin(self, steps: int) -> str:
        """The measured steps that a value comes from."""
        if steps in self.steps:
            return f"measured at {steps} steps"
        low = max(count for count in self.steps if count < steps)
        return f"between {low} and {min(count for count in self.steps if count > steps)} measured steps"


@dataclass(frozen=True)
class Quality:
    """A table of `elit sweep`, read for planning."""

    path: Path
    metric: str
    curves: tuple[Curve, ...]
    model_sha256: str
    """Digest of the network that was swept; empty in an older table."""

    def loss(self, value: float) -> float:
        """Lower is better, whatever the metric."""
        return loss(self.metric, value)


def find_table(folder: Path) -> Path | None:
    """The table of a sweep in a model's folder or beside it; for a packaged model, also in the user's cache."""
    places = [place / name for place in (folder, folder.parent, measurements_folder(folder)) for name in NAMES]
    return next((place for place in places if place.is_file()), None)


def read_quality(path: Path, metric: str | None = None) -> Quality:
    """The curves of a sweep's table under its first detector that has `metric`, default that detector's first one.

    Rows count where their number of samples is the largest. Rows of another solver than Euler's, of shifted times, and
    with one budget a step, which hold for no other steps, are left out. Raises ValueError where nothing remains.
    """
    points = read_table(path)
    metrics = [name for name in METRICS if any(name in point.scores for point in points)]
    if metric is not None and metric not in metrics:
        raise ValueError(f"quality={metric!r}: {str(path)!r} has {', '.join(metrics) or 'no metric'}")
    metric = metric or next((name for name in METRICS if points and name in points[0].scores), "")
    scored = [(point, point.sampling) for point in points if metric in point.scores]
    usable = [(point, setting) for point, setting in scored if _comparable(setting)]
    usable = [(point, setting) for point, setting in usable if point.detector == usable[0][0].detector]
    most = max((point.count for point, _ in usable), default=None)
    usable = [(point, setting) for point, setting in usable if point.count == most]
    if not usable:
        raise ValueError(f"table={str(path)!r}: has no scores of Euler steps; make one with elit sweep")
    by_setting: dict[Sampling, dict[int, float]] = {}
    for point, setting in usable:
        by_setting.setdefault(replace(setting, steps=1, seed=0), {})[setting.steps] = point.scores[metric]
    curves = [
        Curve(setting, tuple(sorted(by)), tuple(by[steps] for steps in sorted(by)))
        for setting, by in by_setting.items()
    ]
    return Quality(path, metric, tuple(curves), usable[0][0].model_sha256)


def _comparable(setting: Sampling) -> bool:
    return setting.solver == "euler" and setting.shift == 1 and not isinstance(setting.budget, tuple)
