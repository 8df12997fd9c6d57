"""Options that commands share."""

from dataclasses import dataclass, fields

from elit.budgets import ANY_COUNT, schedule_budgets
from elit.cli.main import Command
from elit.config import require, require_counts
from elit.flow.guidance import Guidance, make_guidance
from elit.sampling.settings import STEPS, GuidanceKind, Precision, Sampling, Solver


@dataclass(frozen=True, kw_only=True)
class OnDevice(Command):
    """Options of commands that compute."""

    device: str | None = None  # Such as cuda or cpu; default: cuda where there is one.


@dataclass(frozen=True, kw_only=True)
class OfNetwork(OnDevice):
    """Options of commands that run a network."""

    dtype: Precision = "float32"  # Precision of the network; the solver's state and losses stay float32.


@dataclass(frozen=True, kw_only=True)
class GuidanceArgs:
    """Options of guidance."""

    guidance: GuidanceKind = "none"  # cfg drops the class in the second branch, ag lowers its budget, ccfg does both.
    scale: float = 1.5  # Guidance scale; 1 is off.
    guidance_budget: str = "1"  # Second branch of ag and ccfg: latents per window (1) or a share of them (25%).
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # Times between which guidance acts; 0 = noise, 1 = data.

    def __post_init__(self) -> None:
        for name in ("scale", "guidance_budget", "guidance_interval") if self.guidance == "none" else ():
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{name} has no effect without guidance: add --guidance cfg, ag or ccfg")
        self.make_guidance()

    def make_guidance(self) -> Guidance | None:
        return make_guidance(self.guidance, self.scale, self.guidance_budget, self.guidance_interval)


@dataclass(frozen=True, kw_only=True)
class SamplingArgs(GuidanceArgs):
    """Options that become a `Sampling`."""

    budget: str = "full"
    """Latents per window (8; 1 is one latent), a share of them (50%), all (100%), or a schedule over t
    (50%@0-0.5,100%@0.5-1)."""
    steps: int = STEPS  # Solver steps.
    solver: Solver = "euler"  # heun is second order and evaluates twice a step.
    shift: float = 1.0  # More of the steps near noise; 1 is even.
    cache: float = 0.0  # Reuse the last output while the time embedding moves by less, relatively; 0 is off.
    seed: int = 0  # Seed of the first sample; the next ones count up.

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "steps")
        require(self.shift > 0, "shift", self.shift, "above 0")
        require(self.cache >= 0, "cache", self.cache, "at least 0")
        schedule_budgets(self.budget, [0.0], ANY_COUNT)

    def sampling(self) -> Sampling:
        return Sampling.from_dict({each.name: getattr(self, each.name) for each in fields(SamplingArgs)})
