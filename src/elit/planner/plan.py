"""A target, and a plan: the settings of sampling that `elit.plan` chose for it, with what they take and give."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from elit.config import require
from elit.models.transformer import Transformer
from elit.planner.quality import Quality
from elit.sampling.settings import Sampling


@dataclass(frozen=True, kw_only=True)
class Plan(Sampling):
    """Settings for `elit.sample(model, y, plan)` and `pipe(..., plan=plan)`; the solver is Euler's."""

    batch: int = 1
    """Images at a time, for which `ms` is."""
    ms: float | None = None
    """Predicted wall-clock of the whole run of `batch` images; None without a profile of this machine."""
    gflops: float | None = None
    """GFLOPs of one image, all steps and guidance included."""
    metric: str | None = None
    """Metric of `quality`, such as fd; None where no sweep has measured a comparable setting."""
    quality: float | None = None
    """Predicted by the sweep, between measured steps."""
    words: str = ""
    """The plan explained."""

    def __str__(self) -> str:
        return self.words or repr(self)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A limit on the milliseconds of a whole run of a batch, or on the GFLOPs of one image."""

    name: Literal["ms", "gflops"]
    limit: float
    text: str
    """The target as the user gave it."""
    margin: float = 0.0
    """Share by which times stay below the limit, since predictions are off by it; FLOPs are exact."""

    def met(self, plan: Plan) -> bool:
        return self.cost(plan) * (1 + self.margin) <= self.limit

    def cost(self, plan: Plan) -> float:
        cost = plan.gflops if self.name == "gflops" else plan.ms
        assert cost is not None
        return cost


def make_target(batch: int, **targets: float | None) -> Target:
    """The target that is given; a rate is the time of a batch at that rate. Raises ValueError unless there is one."""
    names = ("target_ms", "target_gflops", "target_images_per_s")
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"{', '.join(given) or 'no target'} given; give one of {', '.join(names)}")
    ((name, value),) = given.items()
    require(0 < value < float("inf"), name, value, "a number above 0")
    limit = 1e3 * batch / value if name == "target_images_per_s" else value
    return Target(name="gflops" if name == "target_gflops" else "ms", limit=limit, text=f"{name}={value:g}")


def explain(
    plan: Plan, target: Target, fitting: Sequence[Plan], quality: Quality | None, model: Transformer, note: str
) -> str:
    """The plan's settings, cost and quality, how its quality is known, and what all latents reach at the same cost.

    fitting: all measured plans that keep to the target; empty where the plan is not from a table.
    """
    images = f"for {plan.batch} images" if plan.batch > 1 else "for an image"
    time = f"{plan.ms:.4g} ms {images}, " if plan.ms is not None else ""
    room = f", less {target.margin:.0%}, the profile's error" if target.margin else ""
    text = f"{plan.describe()}: {time}{plan.gflops:.4g} GFLOPs each (asked: {target.text}{room})."
    if quality is None or plan.quality is None:
        return text + _unknown(plan, quality) + note
    setting = plan.budget, plan.guidance, plan.cache
    curve = next(c for c in quality.curves if (c.setting.budget, c.setting.guidance, c.setting.cache) == setting)
    text += f" {quality.metric} {plan.quality:.4g}, {curve.origin(plan.steps)}, by {quality.path}."
    full = [each for each in fitting if each.budget in (None, *model.budgets[-1:])]
    if full and plan not in full:
        best = min(full, key=lambda each: (quality.loss(each.quality or 0.0), target.cost(each)))
        text += f" All latents reach {quality.metric} {best.quality:.4g} at that cost, with {best.steps} steps."
    return text + note


def _unknown(plan: Plan, quality: Quality | None) -> str:
    if plan.cache:
        return " Its quality under caching is not known; the settings follow the paper's findings."
    if quality is not None:
        return f" Its quality is not known: {quality.path} has nothing so cheap; it follows the paper's findings."
    return (
        " Its quality is not known: the settings follow the paper's findings, fewer tokens before fewer steps. "
        "elit sweep MODEL --steps 4 8 16 40 --guidance none ccfg measures it, and plans are then chosen by it."
    )
