"""The ladder of a service from a sweep's table: of the settings that were scored, those that no other one beats."""

from dataclasses import dataclass
from pathlib import Path

from elit.budgets import resolve_budget
from elit.evaluate.plane import pareto_front
from elit.flow.guidance import CCFG, CFG, Guidance
from elit.models.transformer import Transformer
from elit.planner.choose import Pricing, check_table, measured_plans, network_folder
from elit.planner.quality import Quality, find_table, read_quality
from elit.serve.costs import Rung, spread
from elit.serve.settings import ServiceSettings

MOST_RUNGS = 12


@dataclass(frozen=True, kw_only=True)
class TableLadder:
    """What a service goes up and down, and where it is from."""

    rungs: tuple[Rung, ...]
    """From the cheapest to the best."""
    metric: str
    """By which one setting is better than another."""
    table: Path

    def __str__(self) -> str:
        first, last = (
            f"{steps} steps" + (f" with {num_latents} latents" if num_latents else "")
            for steps, num_latents in (self.rungs[0], self.rungs[-1])
        )
        return (
            f"{len(self.rungs)} settings, the best by {self.metric} for their FLOPs in {self.table}: {first} to {last}"
        )


def find_ladder(model: Transformer, folder: Path, service: ServiceSettings) -> TableLadder | None:
    """By the table of `elit sweep` in the folder of `model` or beside it; None without one of this network.

    Raises ValueError where the table in the folder is damaged or of another network.
    """
    place = network_folder(folder)
    path = place and find_table(place)
    quality, _ = check_table(read_quality(path), model, place) if path else (None, "")
    return table_ladder(model, quality, service) if quality else None


def table_ladder(model: Transformer, quality: Quality, service: ServiceSettings) -> TableLadder | None:
    """The front of a table; None where less than two settings remain.

    Settings have the service's guidance, a budget that is the same in all steps, and steps between the fewest and the
    most that were scored with it, all within the service's limits. One that costs more FLOPs than another is in only
    if its score is better.
    """
    least = resolve_budget(service.least_budget, model.budgets) if service.least_budget else None
    scored: list[tuple[float, float, Rung]] = []
    for plan in measured_plans(quality, Pricing(model), guidance_of(service)):
        if not isinstance(plan.budget, int | None):
            continue
        num_latents = resolve_budget(plan.budget, model.budgets)
        if (num_latents or 0) >= (least or 0) and (service.least_steps or 0) <= plan.steps <= service.most_steps:
            assert plan.gflops is not None
            assert plan.quality is not None
            scored.append((plan.gflops, quality.loss(plan.quality), (plan.steps, num_latents)))
    front = pareto_front([cost for cost, _, _ in scored], [loss for _, loss, _ in scored])
    rungs = tuple(scored[front[place]][2] for place in spread(range(len(front)), MOST_RUNGS)) if front else ()
    return TableLadder(rungs=rungs, metric=quality.metric, table=quality.path) if len(rungs) > 1 else None


def guidance_of(service: ServiceSettings) -> Guidance | None:
    """Of requests that name none."""
    scale = service.scale(1.0)
    if scale == 1:
        return None
    return CCFG(scale, service.guidance_budget) if service.guidance_budget else CFG(scale)
