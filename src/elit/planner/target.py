"""What a plan has to keep to."""

from dataclasses import dataclass

from elit.arguments import real_number
from elit.planner.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Target:
    """A bound on time or on work, one of the two."""

    ms: float | None
    """Wall-clock of the whole run of a batch."""
    gflops: float | None
    """Of one image."""
    text: str
    """As the user gave it."""
    margin: float = 0.0
    """Share by which times are kept below the bound, since predictions are off by it; FLOPs are exact."""

    def met(self, plan: Plan) -> bool:
        if self.gflops is not None:
            return self.cost(plan) <= self.gflops
        assert self.ms is not None
        return self.cost(plan) * (1 + self.margin) <= self.ms

    def cost(self, plan: Plan) -> float:
        cost = plan.gflops if self.ms is None else plan.ms
        assert cost is not None
        return cost


def make_target(
    *, target_ms: float | None, target_gflops: float | None, target_images_per_s: float | None, batch: int
) -> Target:
    """The one that is given; a rate is the time of a batch at that rate. Raises ValueError."""
    names = {"target_ms": target_ms, "target_gflops": target_gflops, "target_images_per_s": target_images_per_s}
    given = {name: value for name, value in names.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"{', '.join(given) or 'no target'} given; give one of {', '.join(names)}")
    ((name, value),) = given.items()
    value = real_number(name, value, above=0)
    ms = target_ms if target_images_per_s is None else 1e3 * batch / target_images_per_s
    return Target(ms=ms, gflops=target_gflops, text=f"{name}={value:g}")
