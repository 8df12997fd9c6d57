"""A plan: the settings of a sampling run that `elit.plan` chose for a target, and what it expects of them."""

from dataclasses import dataclass
from typing import Any

from elit.arguments import shortened
from elit.budgets import Schedule
from elit.flow.guidance import Guidance


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Goes into `elit.sample(..., plan=plan)` and `pipe(..., plan=plan)`; the solver is Euler's."""

    steps: int
    budget: Schedule = None
    guidance: Guidance | None = None
    cache: float = 0.0
    """Threshold of step caching; 0 is off."""
    batch: int = 1
    """Images at a time, for which `ms` is."""
    ms: float | None = None
    """Predicted wall-clock of the whole run of `batch` images; None without a profile of this machine."""
    gflops: float | None = None
    """Of one image, all steps and guidance included."""
    metric: str | None = None
    """What `quality` is of, such as fd; None where no sweep has measured the like of this plan."""
    quality: float | None = None
    """Predicted by the sweep, between measured steps."""
    words: str = ""
    """The plan explained."""

    def __str__(self) -> str:
        return self.words or repr(self)


def check_plan_alone(plan: Any, **settings: tuple[Any, Any]) -> None:
    """Raises ValueError where a setting that a plan decides is given beside it; each setting: its value and default."""
    if not isinstance(plan, Plan):
        raise ValueError(f"plan={shortened(plan)}: give what elit.plan returns")
    for name, (value, default) in settings.items():
        # Tensors and arrays have no one answer to whether they are equal.
        if value is not default and not (isinstance(value, int | float | str) and value == default):
            decided = ", ".join(settings)
            raise ValueError(f"plan, {name}={shortened(value)}: a plan decides {decided}; leave {name} or it out")
