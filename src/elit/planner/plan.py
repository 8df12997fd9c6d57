"""A target, and a plan: the settings of sampling that `elit.plan` chose for it, with what they take and give."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from elit.config import require
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


class Target(NamedTuple):
    """A limit on the milliseconds of a whole run of a batch, or on the GFLOPs of one image."""

    name: Literal["ms", "gflops"]
    limit: float
    text: str  # as the user gave it

    def cost(self, plan: Plan) -> float:
        return getattr(plan, self.name)


def make_target(batch: int, **targets: float | None) -> Target:
    """The target that is given; a rate is the time of a batch at that rate. Raises ValueError unless there is one."""
    names = ("target_ms", "target_gflops", "target_images_per_s")
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"{', '.join(given) or 'no target'} given; give one of {', '.join(names)}")
    ((name, value),) = given.items()
    require(0 < value < float("inf"), name, value, "a number above 0")
    limit = 1e3 * batch / value if name == "target_images_per_s" else value
    return Target("gflops" if name == "target_gflops" else "ms", limit, f"{name}={value:g}")
