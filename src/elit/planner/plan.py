"""A plan: settings of sampling that `elit.plan` chose for a target, and what it expects of them."""

from dataclasses import dataclass

from elit.sampling.settings import Sampling


@dataclass(frozen=True, kw_only=True)
class Plan(Sampling):
    """Settings for `elit.sample(model, y, plan)` and `pipe(..., plan=plan)`; the solver is Euler's."""

    batch: int = 1
    """Images at a time, for which `ms` is."""
    ms: float | None = None
    """Predicted wall-clock of the whole run of `batch` images; None without a profile of this machine."""
    gflops: float | None = None
    """Of one image, all steps and guidance included."""
    metric: str | None = None
    """Metric of `quality`, such as fd; None where no sweep has measured a comparable setting."""
    quality: float | None = None
    """Predicted by the sweep, between measured steps."""
    words: str = ""
    """The plan explained."""

    def __str__(self) -> str:
        return self.words or repr(self)
