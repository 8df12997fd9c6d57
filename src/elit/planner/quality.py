"""Quality measured by a sweep: a curve over steps for each budget, guidance and cache."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from elit.evaluate.chunks import describe_network, recipe_digest
from elit.evaluate.metrics import METRICS
from elit.evaluate.sweep import loss, read_table
from elit.models.transformer import Transformer
from elit.pretrained import measurements_folder
from elit.sampling.engine import in_dtype
from elit.sampling.settings import Sampling

NAMES = ("sweep.jsonl", "sweep.parquet")


@dataclass(frozen=True)
class Curve:
    setting: Sampling  # all but its steps
    steps: tuple[int, ...]  # measured, ascending
    values: tuple[float, ...]  # the metric there

    def sampling(self, steps: int) -> Sampling:
        return replace(self.setting, steps=steps)

    def at(self, steps: int) -> float | None:
        """The metric at `steps`: linear in log(steps) between the measured ones, None beyond them."""
        if not self.steps[0] <= steps <= self.steps[-1]:
            return None
        return float(np.interp(math.log(steps), np.log(self.steps), self.values))


@dataclass(frozen=True)
class Quality:
    """A table of `elit sweep`, read for planning."""

    path: Path
    metric: str
    curves: tuple[Curve, ...]
    model_sha256: str  # digest of the network that was swept; empty in an older table

    def loss(self, value: float) -> float:
        return loss(self.metric, value)


def find_table(folder: Path) -> Path | None:
    places = [place / name for place in (folder, folder.parent, measurements_folder(folder)) for name in NAMES]
    return next((place for place in places if place.is_file()), None)


def read_quality(path: Path, metric: str | None = None) -> Quality:
    """The curves of a table under its first detector that has `metric`, of the most samples, of Euler's even steps."""
    points = read_table(path)
    metrics = [name for name in METRICS if any(name in point.scores for point in points)]
    if metric is not None and metric not in metrics:
        raise ValueError(f"quality={metric!r}: {str(path)!r} has {', '.join(metrics) or 'no metric'}")
    metric = metric or next((name for name in METRICS if points and name in points[0].scores), "")
    usable = [
        (point, setting)
        for point, setting in ((point, point.sampling) for point in points if metric in point.scores)
        if setting.solver == "euler" and setting.shift == 1 and not isinstance(setting.budget, tuple)
    ]
    usable = [(point, setting) for point, setting in usable if point.detector == usable[0][0].detector]
    if not usable:
        raise ValueError(f"table={str(path)!r}: has no scores of Euler steps; make one with elit sweep")
    most = max(point.count for point, _ in usable)
    by_setting: dict[Sampling, dict[int, float]] = {}
    for point, setting in usable:
        if point.count == most:
            by_setting.setdefault(replace(setting, steps=1, seed=0), {})[setting.steps] = point.scores[metric]
    rows = {setting: sorted(by_steps.items()) for setting, by_steps in by_setting.items()}
    curves = tuple(Curve(setting, *zip(*pairs, strict=True)) for setting, pairs in rows.items())
    return Quality(path, metric, curves, usable[0][0].model_sha256)


def open_quality(
    model: Transformer, folder: Path | None, *, table: str | Path | None = None, metric: str | None = None
) -> Quality | None:
    """The sweep's table of this network; a neighbour's is skipped, one given by name a ValueError."""
    path = Path(table) if table is not None else folder and find_table(folder)
    if path is None:
        return None
    quality = read_quality(path, metric)
    # Weights that are rounded here may be those of the table.
    if not quality.model_sha256 or model.dtype != torch.float32 or _is_of(model, quality.model_sha256):
        return quality
    if table is None and folder is not None and path.parent == folder.parent:
        return None
    raise ValueError(f"table={str(path)!r}: made for another network; make it again with elit sweep")


def _is_of(model: Transformer, digest: str) -> bool:
    """True where `elit sweep` gives the network that name, or its weights rounded."""
    rounded = (in_dtype(model, dtype) for dtype in (torch.bfloat16, torch.float16) if dtype != model.dtype)
    return any(recipe_digest(describe_network(each)) == digest for each in (model, *rounded))
