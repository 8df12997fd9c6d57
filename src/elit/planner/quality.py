"""Quality measured by a sweep: a curve over steps for each budget, guidance and cache."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from elit.evaluate.plane import loss
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
    model_sha256: str | None
    """Digest of the network that was swept; None in an older table."""

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
    rows = _read_rows(path)
    metrics = [name for name in METRICS if any(row.get(name) is not None for row in rows)]
    if metric is not None and metric not in metrics:
        raise ValueError(f"quality={metric!r}: {str(path)!r} has {', '.join(metrics) or 'no metric'}")
    metric = metric or next((name for name in METRICS if rows and rows[0].get(name) is not None), "")
    scored = [(row, Sampling.from_dict(row)) for row in rows if row.get(metric) is not None]
    usable = [(row, setting) for row, setting in scored if _comparable(setting)]
    usable = [(row, setting) for row, setting in usable if row["detector"] == usable[0][0]["detector"]]
    most = max((row["count"] for row, _ in usable), default=None)
    usable = [(row, setting) for row, setting in usable if row["count"] == most]
    if not usable:
        raise ValueError(f"table={str(path)!r}: has no scores of Euler steps; make one with elit sweep")
    by_setting: dict[Sampling, dict[int, float]] = {}
    for row, setting in usable:
        by_setting.setdefault(replace(setting, steps=1, seed=0), {})[setting.steps] = row[metric]
    curves = [
        Curve(setting, tuple(sorted(by)), tuple(by[steps] for steps in sorted(by)))
        for setting, by in by_setting.items()
    ]
    return Quality(path, metric, tuple(curves), usable[0][0].get("model_sha256"))


def _comparable(setting: Sampling) -> bool:
    return setting.solver == "euler" and setting.shift == 1 and not isinstance(setting.budget, tuple)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"table={str(path)!r}: no such file; elit sweep writes one")
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_table(path).to_pylist()
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"table={str(path)!r}: damaged ({error}); elit sweep writes it again") from None
