"""Many settings of one network, each scored once and found again: the points of the compute–quality plane."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from elit.budgets import Schedule, format_schedule
from elit.evaluate.chunks import Progress
from elit.evaluate.plane import Point
from elit.evaluate.recipe import Recipe, recipe_digest
from elit.evaluate.samples import Sampler, SampleSet
from elit.evaluate.score import MetricGroup, score, score_path, stored_score
from elit.flow.guidance import Guidance
from elit.sampling.settings import Sampling


def make_settings(
    sampler: Sampler,
    *,
    budgets: Sequence[Schedule],
    steps: Sequence[int],
    guidance: Sequence[Guidance | None] = (None,),
    caches: Sequence[float] = (0.0,),
    like: Sampling = Sampling(),  # noqa: B008
) -> tuple[list[Sampling], list[str]]:
    """All combinations, budgets outermost, and a note on each AG that does not fit its budget and is left out.

    like: the settings that all have alike. Raises ValueError for other settings that do not fit the network.
    """
    by_recipe: dict[str, Sampling] = {}
    notes: dict[str, None] = {}
    for budget, count, each, cache in product(budgets, steps, guidance, caches):
        sampling = replace(like, steps=count, budget=budget, guidance=each, cache=cache)
        try:
            by_recipe.setdefault(recipe_digest(sampler.recipe(sampling)), sampling)
        except ValueError as error:
            if each is None or each.kind != "ag":
                raise
            notes[f"AG at budget {budget} is left out: {error}"] = None
    return list(by_recipe.values()), list(notes)


def sweep(
    sampler: Sampler,
    settings: Sequence[Sampling],
    groups: Sequence[MetricGroup],
    *,
    count: int,
    progress: Progress | None = None,
) -> tuple[list[Point], int]:
    """Scores `count` samples of every setting under every group; (points, scores found). Empty but in the main process.

    All settings are sampled a part at a time in turn, each part as long as all before it, so that the machine's other
    work slows all alike and their milliseconds, of the fastest chunk, compare.
    """
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
