"""Many settings of one network, each scored once and found again: the points of the compute–quality plane.

OUT/sets, features, references, scores    as `elit evaluate` leaves and finds them
OUT/sweep.jsonl                           a row a setting and detector; or any name that ends in .parquet
"""

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from elit.budgets import Budget, Schedule, format_schedule, resolve_budget, schedule_budgets
from elit.evaluate.chunks import Progress, Share
from elit.evaluate.plane import Point
from elit.evaluate.recipe import recipe_digest
from elit.evaluate.samples import CHUNK, Sampler, SampleSet, Setting
from elit.evaluate.score import MetricGroup, Result, possible_metrics, score, score_recipe, stored_score
from elit.files import replacing, write_text
from elit.flow.guidance import KINDS, Guidance, make_guidance
from elit.flow.solver import time_grid


def make_settings(
    sampler: Sampler,
    *,
    budgets: Sequence[Schedule],
    steps: Sequence[int],
    guidance: Sequence[str] = ("none",),
    scales: Sequence[float] = (),
    guidance_budget: Budget = 1,
    interval: tuple[float, float] = (0.0, 1.0),
    caches: Sequence[float] = (),
    **same: Any,
) -> tuple[list[Setting], list[str]]:
    """All combinations, budgets outermost, and a note on each that was left out: two ways to write one recipe are one.

    budgets: counts, shares or schedules over t. guidance: of `KINDS`; all but none at each of `scales`.
    guidance_budget, interval: of `Guidance`. caches: thresholds of step caching, beside none.
    same: further fields of `Setting`. AG is left out where its second branch
    would keep more latents than the first. Raises ValueError for what does not fit the network.
    """
    for name, values in (("budgets", budgets), ("steps", steps), ("guidance", guidance)):
        if not values:
            raise ValueError(f"{name}: give at least one")
    if wrong := [kind for kind in guidance if kind not in KINDS]:
        raise ValueError(f"guidance={wrong[0]!r}: give some of {', '.join(KINDS)}")
    if not scales and set(guidance) - {"none"}:
        raise ValueError("scales: give at least one for guidance other than none")
    guides: list[Guidance | None] = []
    for kind in guidance:
        many = [1.0] if kind == "none" else scales
        guides += [make_guidance(kind, scale, guidance_budget, interval) for scale in many]
    by_recipe: dict[str, Setting] = {}
    notes: list[str] = []
    for budget in budgets:
        for count in steps:
            of_steps = schedule_budgets(budget, time_grid(count, same.get("shift", 1.0))[:-1], sampler.model.budgets)
            for guide in guides:
                if guide is not None and guide.kind == "ag" and sampler.model.budgets and guide.scale != 1:
                    weak = resolve_budget(guide.budget, sampler.model.budgets)
                    # pyrefly: ignore[unsupported-operation]
                    if any(weak > main for main in of_steps) or all(weak == main for main in of_steps):
                        notes.append(f"AG at budget {budget} is left out: its second branch keeps {weak} latents")
                        continue
                for cache in (0.0, *caches):
                    setting = Setting(steps=count, budget=budget, guidance=guide, cache=cache, **same)
                    by_recipe.setdefault(recipe_digest(sampler.recipe(setting)), setting)
    return list(by_recipe.values()), list(dict.fromkeys(notes))


def sweep(
    sampler: Sampler,
    settings: Sequence[Setting],
    groups: Sequence[MetricGroup],
    *,
    count: int,
    out: Path,
    chunk: int = CHUNK,
    batch_size: int = 256,
    share: Share = Share(),  # noqa: B008
    progress: Progress | None = None,
) -> tuple[list[Point], int]:
    """Scores `count` samples of every setting under every group; (points, how many were there). Empty but in main.

    A score that OUT has already, from this or from `elit evaluate`, is taken from there. All settings are sampled a
    part at a time in turn, each part as long as all before it: what else the machine does then hits them alike, and
    a setting's milliseconds, of its fastest chunk, compare. progress: (samples done, samples to make).
    """
    sets = [sampler.planned(setting, count) for setting in settings]
    missing = _missing(sets, groups, out, chunk, share)
    total, done = count * sum(map(bool, missing)), 0
    if total:
        sampler.warm_up()
    ends = part_ends(count, sampler.chunk * share.world)
    for begin, end in zip([0, *ends], ends, strict=False):
        for setting, samples, wanted in zip(settings, sets, missing, strict=True):
            if not wanted:
                continue
            sampler.draw(setting, end, batch_size=batch_size, share=share)
            for group in (groups[j] for j in wanted) if end == count else ():
                options: dict[str, Any] = {"metrics": group.metrics, "chunk": chunk, "batch_size": batch_size}
                score(samples, group.detector, group.reference, out=out, share=share, **options)
            done += end - begin
            if progress:
                progress(done, total)
    if not share.main:
        return [], 0
    points = []
    for setting, samples in zip(settings, sets, strict=True):
        for group in groups:
            result = stored_score(_recipe(samples, group, chunk), out)
            assert result is not None
            points.append(_point(setting, samples, group, result, sampler, out))
    return points, len(points) - sum(map(len, missing))


def part_ends(count: int, first: int) -> list[int]:
    """Where each part of `count` samples ends: at `first`, then twice as far every time, and at `count`."""
    ends = []
    while first < count:
        ends.append(first)
        first *= 2
    return [*ends, count]


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


def _recipe(samples: SampleSet, group: MetricGroup, chunk: int) -> dict[str, Any]:
    metrics = possible_metrics(samples, group.detector, group.reference, group.metrics)
    return score_recipe(samples.recipe, samples.count, group.detector, group.reference, metrics, chunk)


def _missing(
    sets: Sequence[SampleSet], groups: Sequence[MetricGroup], out: Path, chunk: int, share: Share
) -> list[list[int]]:
    """For every set, the groups whose score is not there yet. The main process looks, since it alone has references."""
    looked: list[list[list[int]]] = [[]]
    if share.main:
        looked = [
            [
                [j for j, group in enumerate(groups) if stored_score(_recipe(samples, group, chunk), out) is None]
                for samples in sets
            ]
        ]
    return broadcast_object_list(looked)[0] if share.world > 1 else looked[0]


def _point(
    setting: Setting, samples: SampleSet, group: MetricGroup, result: Result, sampler: Sampler, out: Path
) -> Point:
    recipe, budgets = samples.recipe, sampler.model.budgets
    of_steps = recipe["budget"] if isinstance(recipe["budget"], list) else [recipe["budget"]]
    guided = recipe["guidance"] or {"kind": "none", "scale": 1.0, "budget": None, "interval": [0.0, 1.0]}
    assert result.ms is not None
    assert result.saturation is not None
    return Point(
        budget=_name(setting.budget, of_steps) if budgets else "all",
        share=sum(of_steps) / len(of_steps) / budgets[-1] if budgets else 1.0,
        steps=recipe["steps"],
        guidance=guided["kind"],
        scale=float(guided["scale"]),
        guidance_budget=guided["budget"],
        count=samples.count,
        gflops=samples.gflops,
        ms=result.ms,
        saturation=result.saturation,
        cache=recipe["cache"],
        calls=sampler.calls(setting),
        detector=group.specification,
        recipe_sha256=recipe_digest(result.recipe),
        file=str(result.path.relative_to(out)),
        solver=recipe["solver"],
        shift=float(recipe["shift"]),
        guidance_low=float(guided["interval"][0]),
        guidance_high=float(guided["interval"][1]),
        model_sha256=recipe_digest(recipe["model"]),
        scores=result.scores,
    )


def _name(budget: Schedule, of_steps: Sequence[int]) -> str:
    """Latents per group; of a schedule the text, or if it was no text "8×4, 16×4", for four steps each."""
    runs = [(latents, len(list(group))) for latents, group in groupby(of_steps)]
    if len(runs) == 1:
        return str(of_steps[0])
    if isinstance(budget, str):
        return format_schedule(budget)
    return ", ".join(f"{latents}×{count}" for latents, count in runs)
