"""Many settings of one network, each scored once: points, the front among them, the loss of smaller budgets."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, Self

from elit.budgets import Schedule, format_schedule
from elit.evaluate.chunks import Progress, Recipe, recipe_digest
from elit.evaluate.metrics import METRICS
from elit.evaluate.samples import Sampler, SampleSet
from elit.evaluate.score import MetricGroup, score, score_path, stored_score
from elit.files import Json, write_text
from elit.flow.guidance import Guidance
from elit.sampling.settings import Sampling


@dataclass(frozen=True, kw_only=True)
class Point:
    """One setting under one detector."""

    budget: str  # latents per window, or a schedule over the steps; "all" for a network without an interface
    share: float  # share of the latents, mean over the steps
    steps: int
    guidance: str  # none, cfg, ag or ccfg
    scale: float  # guidance scale; 1 without guidance
    guidance_budget: int | None  # latents per window of the second branch of ag and ccfg
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
    """JSON lines, a row a point."""
    write_text(path, "".join(json.dumps(point.row()) + "\n" for point in points))


def read_table(path: Path) -> list[Point]:
    """The points of a file of `write_table`, of any version, older ones in Parquet too. Raises ValueError."""
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
    """Indices of points that no other beats, by rising cost (paper Figures 1, 8 and 14); of equal ones all stay."""
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
    """(point, ρ) for every point whose full budget is among `points` with all else equal (paper Table 5)."""

    own = {"budget", "share", "gflops", "ms", "saturation", "calls", "recipe_sha256", "file", "scores"}

    def all_but_budget(point: Point) -> tuple[Any, ...]:
        return tuple(value for name, value in vars(point).items() if name not in own)

    full = {all_but_budget(point): point.scores[metric] for point in points if point.share == 1}
    ratios = []
    for point in points:
        score, whole = point.scores[metric], full.get(all_but_budget(point), 0.0)
        if min(score, whole) > 0:
            ratios.append((point, score / whole if METRICS[metric].lower else whole / score))
    return ratios


def make_settings(
    sampler: Sampler,
    *,
    budgets: Sequence[Schedule],
    steps: Sequence[int],
    guidance: Sequence[Guidance | None] = (None,),
    caches: Sequence[float] = (0.0,),
    like: Sampling = Sampling(),  # noqa: B008
) -> list[Sampling]:
    """All combinations, budgets outermost, but for AG where it does not fit its budget."""
    by_recipe: dict[str, Sampling] = {}
    for budget, count, each, cache in product(budgets, steps, guidance, caches):
        sampling = replace(like, steps=count, budget=budget, guidance=each, cache=cache)
        try:
            by_recipe.setdefault(recipe_digest(sampler.recipe(sampling)), sampling)
        except ValueError:
            if each is None or each.kind != "ag":
                raise
    return list(by_recipe.values())


def sweep(
    sampler: Sampler,
    settings: Sequence[Sampling],
    groups: Sequence[MetricGroup],
    *,
    count: int,
    progress: Progress | None = None,
) -> tuple[list[Point], int]:
    """Scores `count` samples of every setting under every group; (points, scores found), in the main process."""
    work = sampler.work
    sets = [sampler.planned(sampling, count) for sampling in settings]
    # The main process decides what is missing: it alone has the references.
    recipes: list[list[Recipe]] = []
    missing: list[list[bool]] = []
    if work.main:
        recipes = [[group.recipe(samples, work.chunk) for group in groups] for samples in sets]
        missing = [[stored_score(recipe, work.out) is None for recipe in of_set] for of_set in recipes]
    if work.processes > 1:
        from accelerate.utils import broadcast_object_list

        missing = broadcast_object_list([missing])[0]
    total, done = count * sum(map(any, missing)), 0
    if total:
        sampler.warm_up()
    ends = part_ends(count, work.chunk * work.processes)
    for begin, end in zip([0, *ends], ends, strict=False):
        for sampling, samples, wanted in zip(settings, sets, missing, strict=True):
            if not any(wanted):
                continue
            sampler.make(sampling, end)
            for group, is_missing in zip(groups, wanted, strict=True):
                if is_missing and end == count:
                    score(samples, group, work)
            done += end - begin
            if progress:
                progress(done, total)
    if not work.main:
        return [], 0
    points = [
        _point(sampling, samples, group, recipe, sampler)
        for sampling, samples, of_set in zip(settings, sets, recipes, strict=True)
        for group, recipe in zip(groups, of_set, strict=True)
    ]
    return points, len(points) - sum(map(sum, missing))


def part_ends(count: int, first: int) -> list[int]:
    """The end of each part of `count` samples: `first`, then twice as far every time, and `count`."""
    ends = []
    while first < count:
        ends.append(first)
        first *= 2
    return [*ends, count]


def _point(sampling: Sampling, samples: SampleSet, group: MetricGroup, recipe: Recipe, sampler: Sampler) -> Point:
    out, drawn, budgets = sampler.work.out, samples.recipe, sampler.model.budgets
    result = stored_score(recipe, out)
    assert result is not None
    assert result.ms_per_sample is not None
    assert result.saturation is not None
    of_steps = drawn["budget"] if isinstance(drawn["budget"], list) else [drawn["budget"]]
    name = str(of_steps[0]) if len(set(of_steps)) == 1 else format_schedule(str(sampling.budget))
    guidance = drawn["guidance"] or {"kind": "none", "scale": 1.0, "budget": None, "interval": [0.0, 1.0]}
    return Point(
        budget=name if budgets else "all",
        share=sum(of_steps) / len(of_steps) / budgets[-1] if budgets else 1.0,
        steps=drawn["steps"],
        guidance=guidance["kind"],
        scale=float(guidance["scale"]),
        guidance_budget=guidance["budget"],
        count=samples.count,
        gflops=samples.gflops,
        ms=result.ms_per_sample,
        saturation=result.saturation,
        cache=drawn["cache"],
        calls=sampler.calls(sampling),
        detector=group.specification,
        recipe_sha256=result.recipe_sha256,
        file=str(score_path(recipe, out).relative_to(out)),
        solver=drawn["solver"],
        shift=float(drawn["shift"]),
        guidance_low=float(guidance["interval"][0]),
        guidance_high=float(guidance["interval"][1]),
        model_sha256=recipe_digest(drawn["model"]),
        scores=result.scores,
    )
