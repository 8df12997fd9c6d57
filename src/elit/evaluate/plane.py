"""The compute–quality plane: the points of a sweep, the front among them, and the loss of smaller budgets."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from elit.evaluate.metrics import METRICS
from elit.files import Json, replacing, write_text
from elit.sampling.settings import Sampling


@dataclass(frozen=True, kw_only=True)
class Point:
    """One setting under one detector."""

    budget: str  # latents per group, or a schedule over the steps; "all" for a network without an interface
    share: float  # share of the latents, mean over the steps
    steps: int
    guidance: str  # none, cfg, ag or ccfg
    scale: float  # guidance scale; 1 without guidance
    guidance_budget: int | None  # latents per group of the second branch of ag and ccfg
    count: int  # samples
    gflops: float  # a sample's, all steps and both branches, without the autoencoder
    ms: float  # likewise, in the fastest chunk
    saturation: float  # mean over the samples; `metrics.saturation`
    detector: str  # its specification
    recipe_sha256: str  # digest of everything that decides the scores
    file: str  # the stored score with that recipe, in the sweep's folder
    cache: float = 0.0  # threshold of step caching; 0 is off
    calls: int | None = None  # steps that evaluate the network; with a cache fewer than `steps`
    solver: str = "euler"
    shift: float = 1.0
    guidance_low: float = 0.0  # times between which guidance acts, 0 … 1 without guidance
    guidance_high: float = 1.0
    model_sha256: str = ""  # digest of the network's class, settings and weights, as the recipe has them
    scores: dict[str, float] = field(default_factory=dict)  # by metric

    @property
    def sampling(self) -> Sampling:
        """The settings; with the default seed."""
        return Sampling.from_dict(asdict(self))

    @property
    def scheduled(self) -> bool:
        return not self.budget.isdigit() and self.budget != "all"

    def row(self) -> Json:
        """A row of the results table: flat, a column a metric."""
        flat = asdict(self)
        return flat | flat.pop("scores")

    @classmethod
    def from_row(cls, row: Json) -> Self:
        """A point from its row, of any version; other columns are metrics, those of None left out."""
        names = {each.name for each in fields(cls)} - {"scores"}
        known = {name: value for name, value in row.items() if name in names}
        return cls(**known, scores={n: v for n, v in row.items() if n not in names and v is not None})


def write_table(points: Sequence[Point], path: Path) -> None:
    """A row a point, whole or not at all: Parquet where the name ends so, else JSON lines. All have all columns."""
    rows = [point.row() for point in points]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: row.get(name) for name in columns} for row in rows]
    if path.suffix != ".parquet":
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        return
    import pyarrow as pa
    from pyarrow import parquet

    with replacing(path) as temporary:
        parquet.write_table(pa.Table.from_pylist(rows), temporary)


def read_table(path: Path) -> list[Point]:
    """Reads a file of `write_table`, of any version. Raises ValueError where it is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"cannot read table={str(path)!r}: no such file; elit sweep writes one")
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            rows = parquet.read_table(path).to_pylist()
        else:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [Point.from_row(row) for row in rows]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot read table={str(path)!r}: damaged ({error}); elit sweep writes it again") from None


def loss(metric: str, value: float) -> float:
    return value if METRICS[metric].lower else -value


def best(points: Iterable[Point], metric: str) -> Point:
    return min(points, key=lambda point: loss(metric, point.scores[metric]))


def pareto_front(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Indices of the points that no other one beats, by rising cost (paper Figures 1, 8 and 14). A point is beaten by
    one that is no worse in both, and better in one; of equal points all stay, in their order.
    """
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


def degradations(points: Sequence[Point], metric: str) -> list[tuple[Point, float]]:
    """(point, ρ) for every point whose full budget is among `points` with all else equal (paper Table 5).

    ρ is Q(J̃) / Q(J) for a distance, Q(J) / Q(J̃) for a metric that rises with quality, and exists for scores above 0.
    """

    def all_but_budget(point: Point) -> tuple[Any, ...]:
        guidance = point.guidance, point.scale, point.guidance_budget
        return point.steps, point.cache, point.count, point.detector, guidance

    full = {all_but_budget(point): point.scores[metric] for point in points if point.share == 1}
    ratios = []
    for point in points:
        score, whole = point.scores[metric], full.get(all_but_budget(point), 0.0)
        if min(score, whole) > 0:
            ratios.append((point, score / whole if METRICS[metric].lower else whole / score))
    return ratios
