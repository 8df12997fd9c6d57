"""What a sweep found of a network: quality over steps, a curve for each budget, guidance and cache."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elit.budgets import Schedule, saved_schedule
from elit.evaluate.plane import loss
from elit.evaluate.score import METRICS
from elit.flow.guidance import Guidance, make_guidance
from elit.pretrained import measurements_folder

NAMES = ("sweep.jsonl", "sweep.parquet")


@dataclass(frozen=True)
class Curve:
    """Settings that differ in their steps alone."""

    budget: Schedule
    guidance: Guidance | None
    steps: tuple[int, ...]
    """Measured, ascending."""
    values: tuple[float, ...]
    """The metric there."""
    cache: float = 0.0
    """Threshold of step caching."""

    def at(self, steps: int) -> float | None:
        """The metric at `steps`: linear in log(steps) between the measured ones, None beyond them."""
        if not self.steps[0] <= steps <= self.steps[-1]:
            return None
        return float(np.interp(math.log(steps), np.log(self.steps), self.values))

    def neighbours(self, steps: int) -> str:
        """Where its value comes from, in words."""
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
    model_sha256: str | None
    """Of the network that was swept; None in a table that does not say."""

    def loss(self, value: float) -> float:
        """Lower is better, whatever the metric."""
        return loss(self.metric, value)


def find_table(folder: Path) -> Path | None:
    """The table of a sweep that lies in a model's folder or beside it; of a packaged model, in the user's cache."""
    places = [place / name for place in (folder, folder.parent, measurements_folder(folder)) for name in NAMES]
    return next((place for place in places if place.is_file()), None)


def read_quality(path: Path, metric: str | None = None) -> Quality:
    """The curves of a sweep's table under its first detector that has `metric`, default that detector's first one.

    Of sample counts the largest. Rows of another solver than Euler's, of shifted times, and of schedules that are
    lists, which say nothing of other steps, are left out. Raises ValueError where nothing remains.
    """
    rows = _rows(path)
    metrics = [name for name in METRICS if any(row.get(name) is not None for row in rows)]
    if metric is not None and metric not in metrics:
        raise ValueError(f"quality={metric!r}: {str(path)!r} has {', '.join(metrics) or 'no metric'}")
    if metric is None:
        metric = next((name for name in METRICS if rows and rows[0].get(name) is not None), None)
    usable = [row for row in rows if metric and row.get(metric) is not None and _comparable(row)]
    usable = [row for row in usable if row["detector"] == usable[0]["detector"]]
    usable = [row for row in usable if row["count"] == max(other["count"] for other in usable)]
    if metric is None or not usable:
        raise ValueError(f"table={str(path)!r}: has no scores of Euler steps; make one with elit sweep")
    by_setting: dict[tuple[Any, ...], dict[int, float]] = {}
    for row in usable:
        interval = (row.get("guidance_low", 0.0), row.get("guidance_high", 1.0))
        key = (row["budget"], row["guidance"], row["scale"], row["guidance_budget"], interval, row.get("cache", 0.0))
        by_setting.setdefault(key, {})[row["steps"]] = row[metric]
    curves = tuple(_curve(key, values) for key, values in by_setting.items())
    return Quality(path, metric, curves, usable[0].get("model_sha256"))


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"table={str(path)!r}: no such file; elit sweep writes one")
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_table(path).to_pylist()
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"table={str(path)!r}: damaged ({error}); elit sweep writes it again") from None


def _comparable(row: dict[str, Any]) -> bool:
    return row.get("solver", "euler") == "euler" and row.get("shift", 1.0) == 1 and "×" not in row["budget"]


def _curve(key: tuple[Any, ...], values: dict[int, float]) -> Curve:
    budget, kind, scale, weak, interval, cache = key
    schedule: Schedule = None if budget == "all" else int(budget) if budget.isdigit() else saved_schedule(budget)
    steps = tuple(sorted(values))
    return Curve(
        schedule, make_guidance(kind, scale, weak, interval), steps, tuple(values[count] for count in steps), cache
    )
