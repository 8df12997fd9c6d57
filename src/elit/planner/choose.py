"""`elit.plan`: the settings for a target, chosen among those a sweep has measured or, without one, by a rule."""

from dataclasses import dataclass, replace
from functools import cache as cache_of, partial
from pathlib import Path
from typing import Any, Literal

import torch

from elit.budgets import Schedule, resolve_budget
from elit.config import require
from elit.costs.flops import count_flops, shared_flops
from elit.elastic.load import load_model
from elit.evaluate.sweep import loss
from elit.flow.guidance import CCFG, CFG, Guidance
from elit.models.transformer import Transformer
from elit.planner.cost import anatomy, evaluations_of
from elit.planner.profile import Profile, profile_path, profile_recipe, read_profile
from elit.planner.quality import Quality, open_quality
from elit.pretrained import model_folder
from elit.sampling.engine import as_dtype
from elit.sampling.evaluations import shares_head
from elit.sampling.settings import STEPS, Sampling

MAX_STEPS = 64
PAPER_SCALE = 1.25
Wanted = Guidance | Literal["any"] | None


@dataclass(frozen=True, kw_only=True)
class Plan(Sampling):
    """Settings for `elit.sample(model, y, plan)` and `pipe(..., plan=plan)`; the solver is Euler's.

    batch, ms: images at a time, and predicted wall-clock of their whole run; None without a profile of this machine.
    gflops: of one image, all steps and guidance. metric, quality: predicted by the sweep, between measured steps; None
    where it has measured no comparable setting. words: the plan explained.
    """

    batch: int = 1
    ms: float | None = None
    gflops: float | None = None
    metric: str | None = None
    quality: float | None = None
    words: str = ""

    def __str__(self) -> str:
        return self.words or repr(self)


def make_target(batch: int, **targets: float | None) -> tuple[Literal["ms", "gflops"], float, str]:
    """What is limited, its limit, a rate as the time of a batch at it, and both as given. Raises ValueError."""
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"{', '.join(given) or 'no target'} given; give one of {', '.join(targets)}")
    ((name, value),) = given.items()
    require(0 < value < float("inf"), name, value, "a number above 0")
    limit = 1e3 * batch / value if name == "target_images_per_s" else value
    return "gflops" if name == "target_gflops" else "ms", limit, f"{name}={value:g}"


def plan(
    model: Transformer | str | Path,
    *,
    target_ms: float | None = None,
    target_gflops: float | None = None,
    target_images_per_s: float | None = None,
    batch: int = 1,
    guidance: Wanted = "any",
    cache: float | None = None,
    dtype: torch.dtype | str | None = None,
    compile: bool = False,
    table: str | Path | None = None,
    quality: str | None = None,
    profile: Profile | str | Path | None = None,
) -> Plan:
    """The best settings of `elit.sample` that keep to one target, for `elit.sample(..., plan=plan)`.

    model: a network, or a saved one's folder: then for the GPU where there is one.
    target_ms: wall-clock of one whole run of all `batch` images, without autoencoder and files; a plan stays below it
    by the profile's mean error. The first run of a process takes longer. target_images_per_s: the same as a rate.
    target_gflops: of one image, all steps and guidance.
    guidance: None for none; "any" leaves it to the plan. cache: the threshold of step caching, 0 for none; None takes
    those of the table. dtype, compile: as `elit.sample` will be called.
    table: of `elit sweep`, default sweep.jsonl or sweep.parquet in the model's folder or beside it. quality: its
    metric, default the first. profile: of `elit profile`, default the one in the model's folder.

    With a table the plan is the point of best quality among its settings, and the steps between them, that keep to the
    target. Without one, or below all it has measured, it is the first that does on `ladder`.
    Raises ValueError for a target that nothing keeps to, where a profile is missing, and for a profile or table of
    another network.
    """
    dtype = as_dtype(dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = model if isinstance(model, Transformer) else load_model(model).to(device)
    folder = network_folder(model)
    targets = {"target_ms": target_ms, "target_gflops": target_gflops, "target_images_per_s": target_images_per_s}
    unit, limit, wanted = make_target(batch, **targets)
    if profile is None:
        profile = find_profile(network, folder, dtype, compile=compile)
    elif not isinstance(profile, Profile):
        profile = read_profile(Path(profile), profile_recipe(network, dtype, compile=compile))
    if profile is None and unit == "ms":
        name = folder or "MODEL"
        raise ValueError(f"{wanted}: no profile of this machine in {name}; run elit profile {name} first")
    scored = open_quality(network, folder, table=table, metric=quality)
    if scored is None and quality is not None:
        raise ValueError(f"quality={quality!r}: no table of elit sweep beside the model; name it with table=")

    # Predicted times are off by the profile's error over held-out runs; FLOPs are counted, not predicted.
    margin = profile.error(held_out=True) if profile is not None and unit == "ms" else 0.0
    pricing = Pricing(network, batch, profile)
    measured = measured_plans(scored, pricing, guidance, cache) if scored else []
    guessed = ladder(network, pricing, guidance, cache or 0.0)

    fits = [[each for each in some if getattr(each, unit) * (1 + margin) <= limit] for some in (measured, guessed)]
    good, rest = fits
    good.sort(key=lambda each: (loss(each.metric or "", each.quality or 0.0), getattr(each, unit)))
    best = next(iter([*good, *rest]), None)
    if best is None:
        least = min([*measured, *guessed], key=lambda each: getattr(each, unit))
        per = "GFLOPs an image" if unit == "gflops" else f"ms for {batch} image{'s' if batch > 1 else ''}"
        cost = f"{getattr(least, unit):.4g} {per}"
        raise ValueError(f"{wanted}: the least possible here is {cost}, with {least.describe()}")
    time = f"{best.ms:.4g} ms for {batch} image{'s' if batch > 1 else ''}, " if best.ms is not None else ""
    words = f"{best.describe()}: {time}{best.gflops:.4g} GFLOPs each (asked: {wanted})."
    if scored is not None and best.quality is not None:
        words += f" {best.metric} {best.quality:.4g} by {scored.path}."
    else:
        words += " Its quality is not known: it follows the paper's order, which small models here do not confirm; "
        words += "elit sweep MODEL --steps 4 8 16 40 --guidance none ccfg measures it."
    return replace(best, words=words)


class Pricing:
    """Settings with their cost: GFLOPs of an image always, milliseconds where there is a profile."""

    def __init__(self, model: Transformer, batch: int = 1, profile: Profile | None = None):
        self.model, self.batch, self.shared = model, batch, shared_flops(model)
        self.flops = cache_of(partial(count_flops, model))  # exact also where windows do not divide the grid
        self.costs = profile.costs(anatomy(model)) if profile else None

    def plan(self, setting: Sampling, **more: Any) -> Plan:
        evaluations = evaluations_of(self.model, setting)
        ms = self.costs.run_ms(evaluations, self.batch) if self.costs else None
        flops = sum(
            times * (sum(self.flops(budget=branch.budget) for branch in each) - shares_head(each) * self.shared)
            for each, times in evaluations.items()
        )
        return Plan(**vars(setting), batch=self.batch, ms=ms, gflops=flops / 1e9, **more)


def measured_plans(quality: Quality, pricing: Pricing, guidance: Wanted, cache: float | None = 0.0) -> list[Plan]:
    """Every curve at all steps from its first to its last measured one; a cached one, whose calls jump, at those."""
    if isinstance(guidance, Guidance) and guidance.kind == "ccfg":  # however its budget is written
        guidance = replace(guidance, budget=guidance.weak_budget(None, pricing.model.budgets))
    plans = []
    for curve in quality.curves:
        if guidance in ("any", curve.setting.guidance) and cache in (None, curve.setting.cache):
            steps = curve.steps if curve.setting.cache else range(curve.steps[0], curve.steps[-1] + 1)
            plans += [
                pricing.plan(curve.sampling(count), metric=quality.metric, quality=curve.at(count)) for count in steps
            ]
    return plans


def ladder(model: Transformer, pricing: Pricing, guidance: Wanted, cache: float = 0.0) -> list[Plan]:
    """Settings from the dearest to the cheapest where nobody has measured quality: the paper's findings in order."""
    budgets = model.budgets
    default = CCFG(PAPER_SCALE, budgets[0]) if budgets else CFG(PAPER_SCALE)
    first, last = (default, None) if isinstance(guidance, str) else (guidance, guidance)
    constant = first is not None and first.kind == "ag"  # whose main branch keeps more than the weak one does
    least = resolve_budget(first.budget, budgets) if first is not None and constant else None
    mains = [num_latents for num_latents in reversed(budgets) if num_latents > (least or 0)]
    halves = {each: max((count for count in budgets if 2 * count <= each), default=each) for each in mains}
    rising = (each if constant or half == each else f"{half}@0-0.5,{each}@0.5-1" for each, half in halves.items())
    tokens = list[Schedule](rising) or [None]
    quarter = max(1, sum(4 * num_latents >= budgets[-1] for num_latents in mains))
    settings: list[tuple[int, Schedule, Guidance | None]] = [
        *((steps, budgets[-1] if budgets else None, first) for steps in range(MAX_STEPS, STEPS - 1, -1)),
        *((STEPS, budget, first) for budget in tokens[:quarter]),
        *((steps, tokens[quarter - 1], first) for steps in range(STEPS - 1, 9, -1)),
        *((10, budget, first) for budget in tokens[quarter:]),
        *([(10, tokens[-1], last)] if last is not first else []),
        *((steps, tokens[-1], last) for steps in range(9, 0, -1)),
    ]
    return [
        pricing.plan(Sampling(steps=steps, budget=budget, guidance=guide, cache=cache))
        for steps, budget, guide in settings
    ]


def network_folder(model: Transformer | str | Path) -> Path | None:
    """The folder with a saved network's config.json; None for one that was never saved."""
    if isinstance(model, Transformer):
        saved = model.config.get("_name_or_path")
        return Path(saved) if saved and Path(saved).is_dir() else None
    folder = model_folder(model)
    return folder / "transformer" if (folder / "model_index.json").is_file() else folder


def find_profile(
    model: Transformer, folder: Path | None, dtype: torch.dtype | None = None, *, compile: bool = False
) -> Profile | None:
    """The profile of this machine in a model's folder. Raises ValueError for a wrong one."""
    recipe = profile_recipe(model, dtype, compile=compile)
    path = folder and profile_path(folder, recipe)
    return read_profile(path, recipe) if path and path.is_file() else None
