"""A plan: the settings of a sampling run that `elit.plan` chose for a target, and what it expects of them."""

from dataclasses import dataclass

from elit.budgets import Schedule
from elit.flow.guidance import Guidance


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Goes into `elit.sample(..., plan=plan)` and `pipe(..., plan=plan)`; the solver is Euler's."""

    steps: int
    budget: Schedule
    guidance: Guidance | None
    cache: float
    """Threshold of step caching; 0 is off."""
