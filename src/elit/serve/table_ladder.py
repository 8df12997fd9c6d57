"""The ladder of a service from a sweep's table: of the settings that were scored, those that no other one beats."""

from pathlib import Path

from elit.budgets import evenly_spaced, resolve_budget
from elit.evaluate.plane import pareto_front
from elit.models.transformer import Transformer
from elit.planner.choose import Pricing, check_table, measured_plans, network_folder
from elit.planner.quality import Quality, find_table, read_quality
from elit.serve.ladder import Rung, make_guidance
from elit.serve.settings import ServiceSettings

MAX_RUNGS = 12


def find_ladder(model: Transformer, folder: Path, service: ServiceSettings) -> tuple[tuple[Rung, ...], str]:
    """The rungs from the table of `elit sweep` in the folder of `model` or beside it, and a line about them.

    No rungs without a table of this network. Raises ValueError where the table in the folder is damaged or of another
    network.
    """
    place = network_folder(folder)
    path = place and find_table(place)
    quality, _ = check_table(read_quality(path), model, place) if path else (None, "")
    rungs = table_ladder(model, quality, service) if quality else ()
    if not quality or not rungs:
        return (), ""
    first, last = (
        f"{steps} steps" + (f" with {count} latents" if count else "") for steps, count in rungs[:: len(rungs) - 1]
    )
    return rungs, f"{len(rungs)} settings, the best by {quality.metric} for their FLOPs in {path}: {first} to {last}"


def table_ladder(model: Transformer, quality: Quality, service: ServiceSettings) -> tuple[Rung, ...]:
    """The front of a table; () where less than two settings remain.

    Settings have the service's guidance, a budget that is the same in all steps, and steps between the fewest and the
    most that were scored with it, all within the service's limits. One that costs more FLOPs than another is in only
    if its score is better.
    """
    least = resolve_budget(service.least_budget, model.budgets) if service.least_budget else None
    guidance = make_guidance(service.scale(1.0), service.guidance_budget or None, model.budgets)
    scored: list[tuple[float, float, Rung]] = []
    for plan in measured_plans(quality, Pricing(model), guidance):
        if not isinstance(plan.budget, int | None):
            continue
        num_latents = resolve_budget(plan.budget, model.budgets)
        if (num_latents or 0) >= (least or 0) and (service.least_steps or 0) <= plan.steps <= service.most_steps:
            scored.append((plan.gflops or 0.0, quality.loss(plan.quality or 0.0), (plan.steps, num_latents)))
    front = pareto_front([cost for cost, _, _ in scored], [loss for _, loss, _ in scored])
    rungs = tuple(scored[place][2] for place in evenly_spaced(front, MAX_RUNGS))
    return rungs if len(rungs) > 1 else ()
