"""A plan in words."""

from collections.abc import Sequence

from elit.models.transformer import Transformer
from elit.planner.plan import Plan
from elit.planner.quality import Quality
from elit.planner.target import Target


def explain(
    plan: Plan, target: Target, fitting: Sequence[Plan], quality: Quality | None, model: Transformer, note: str
) -> str:
    """What the plan is, what it costs, how good it is and how that is known, and what the same cost gives otherwise.

    fitting: all measured plans that keep to the target; empty where the plan is not from a table.
    """
    text = f"{setting_words(plan, model)}: {_costs(plan)} (asked: {target.text}{_room(target)})."
    if quality is None or plan.quality is None:
        return text + _unknown(plan, quality) + note
    settings = plan.budget, plan.guidance, plan.cache
    curve = next(each for each in quality.curves if (each.budget, each.guidance, each.cache) == settings)
    text += f" {quality.metric} {plan.quality:.4g}, {curve.neighbours(plan.steps)}, by {quality.path}."
    full = [each for each in fitting if each.budget in (None, *model.budgets[-1:])]
    if full and plan not in full:
        best = min(full, key=lambda each: (quality.loss(each.quality or 0.0), target.cost(each)))
        text += f" All latents reach {quality.metric} {best.quality:.4g} at that cost, with {best.steps} steps."
    return text + note


def setting_words(plan: Plan, model: Transformer | None = None) -> str:
    """Steps, latents, guidance and caching."""
    of = f" of {model.budgets[-1]}" if model is not None and model.budgets else ""
    words = [f"{plan.steps} step{'s' if plan.steps > 1 else ''}"]
    if isinstance(plan.budget, int):
        words.append(f"{plan.budget}{of} latent{'s' if of or plan.budget > 1 else ''} a group")
    elif plan.budget is not None:
        words.append(f"latents {plan.budget}{of} a group")
    guide = plan.guidance
    if guide is None:
        words.append("no guidance")
    else:
        weak = "" if guide.budget is None else f" with {guide.budget} in its second branch"
        low, high = guide.interval
        when = "" if (low, high) == (0, 1) else f" at t from {low:g} to {high:g}"
        words.append(f"{guide.kind.upper()} {guide.scale:g}{weak}{when}")
    return ", ".join(words) + (f", cache threshold {plan.cache:g}" if plan.cache else "")


def _room(target: Target) -> str:
    return f", less {target.margin:.0%}, the profile's error" if target.ms is not None and target.margin else ""


def _costs(plan: Plan) -> str:
    of = f"for {plan.batch} images" if plan.batch > 1 else "for an image"
    time = f"{plan.ms:.4g} ms {of}, " if plan.ms is not None else ""
    return f"{time}{plan.gflops:.4g} GFLOPs each"


def _unknown(plan: Plan, quality: Quality | None) -> str:
    if plan.cache:
        return " Its quality under caching is not known; the settings follow the paper's findings."
    if quality is not None:
        return f" Its quality is not known: {quality.path} has nothing so cheap; it follows the paper's findings."
    return (
        " Its quality is not known: the settings follow the paper's findings, fewer tokens before fewer steps. "
        "elit sweep MODEL --steps 4 8 16 40 --guidance none ccfg measures it, and plans are then chosen by it."
    )
