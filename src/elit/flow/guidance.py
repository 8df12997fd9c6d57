"""Guidance: CFG, AG and CCFG are one operator with two velocities (paper section 4).

v = v_weak + scale·(v − v_weak), where v is G(x | c; J̃) and v_weak is G(x | ∅; J̃) in CFG, G(x | c; J̃_w) in AG,
G(x | ∅; J̃_w) in CCFG; scale = λ + 1 of the paper: 1 is off, and "+G" in its tables is 1.25.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from elit.budgets import Budget, parse_budget, resolve_budget
from elit.config import require

if TYPE_CHECKING:  # naming a guidance needs no torch
    from torch import Tensor

KINDS = ("none", "cfg", "ag", "ccfg")
ALWAYS = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """A weak branch without the class and/or with fewer latents; built by `CFG`, `AG` and `CCFG`."""

    kind: str
    scale: float
    drop_class: bool
    budget: Budget | str = None  # J̃_w, the weak branch's budget; None = the main branch's.
    interval: tuple[float, float] = ALWAYS  # It acts at times low <= t <= high; elsewhere the main branch runs alone.

    def __post_init__(self) -> None:
        low, high = self.interval
        require(0 <= self.scale < float("inf"), "guidance scale", self.scale, "at least 0")
        require(0 <= low <= high <= 1, "guidance interval", (low, high), "two times in order, between 0 and 1")
        object.__setattr__(self, "interval", (float(low), float(high)))

    def active(self, t: float) -> bool:
        # With a tolerance: 1 − 0.7, a time counted from the other end, must not miss 0.3 by a rounding error.
        return self.scale != 1 and self.interval[0] - 1e-9 <= t <= self.interval[1] + 1e-9

    def weak_budget(self, budget: int | None, budgets: Sequence[int]) -> int | None:
        """J̃_w beside a main branch that keeps `budget` latents. Raises ValueError where it cannot be."""
        if self.kind == "cfg":
            return budget
        require(bool(budgets), "guidance", self.kind, "cfg for a model without a latent interface")
        weak = resolve_budget(self.budget, budgets)
        if self.kind == "ag" and weak is not None and budget is not None:
            require(weak <= budget, "guidance_budget", weak, f"at most the main branch's {budget} for ag")
        return weak


def CFG(scale: float, *, interval: tuple[float, float] = ALWAYS) -> Guidance:
    """Classifier-free guidance: v = G(x|∅; J̃) + scale · (G(x|c; J̃) − G(x|∅; J̃)) (paper section 4).

    scale: λ + 1 of the paper, 1.0 = off. interval: times (low, high), 0 = noise, 1 = data, between which it acts;
    elsewhere the conditional branch runs alone. Raises ValueError for a scale below 0 and an invalid interval.
    """
    return Guidance(kind="cfg", scale=scale, drop_class=True, interval=interval)


def AG(scale: float, budget: Budget | str, *, interval: tuple[float, float] = ALWAYS) -> Guidance:
    """Autoguidance: v = G(x|c; J̃_w) + scale · (G(x|c; J̃) − G(x|c; J̃_w)) (paper section 4).

    budget: J̃_w, latents per window (int), a share of them (float), or either as text; at most the first branch's, or
    ValueError when it is sampled. scale, interval: as in `CFG`.
    """
    return Guidance(kind="ag", scale=scale, drop_class=False, budget=budget, interval=interval)


def CCFG(scale: float, budget: Budget | str, *, interval: tuple[float, float] = ALWAYS) -> Guidance:
    """Cheap CFG: v = G(x|∅; J̃_w) + scale · (G(x|c; J̃) − G(x|∅; J̃_w)) (paper section 4).

    At the smallest budget it costs about a third less than `CFG`. Arguments as in `AG`, but a budget of any size.
    """
    return Guidance(kind="ccfg", scale=scale, drop_class=True, budget=budget, interval=interval)


def make_guidance(
    kind: str, scale: float, budget: Budget | str = None, interval: tuple[float, float] = ALWAYS
) -> Guidance | None:
    """`CFG`, `AG` or `CCFG` by name, None for "none"; the budget of CFG is ignored. Raises ValueError."""
    require(kind in KINDS, "guidance", kind, f"one of {', '.join(KINDS)}")
    if kind in ("none", "cfg"):
        return CFG(scale, interval=interval) if kind == "cfg" else None
    weak = parse_budget(budget) if isinstance(budget, str) else budget
    return {"ag": AG, "ccfg": CCFG}[kind](scale, weak, interval=interval)


class Branch(NamedTuple):
    """One evaluation of the network: with or without the class, and how many latents per window."""

    drop_class: bool
    budget: int | None


def branches(guidance: Guidance | None, t: float, budget: int | None, budgets: Sequence[int]) -> list[Branch]:
    """The branches to evaluate at time t: the main one, and the weak one where guidance acts."""
    main = Branch(False, budget)
    if guidance is None or not guidance.active(t):
        return [main]
    return [main, Branch(guidance.drop_class, guidance.weak_budget(budget, budgets))]


def guided_velocity(velocities: "Sequence[Tensor]", scale: float) -> "Tensor":
    """The guided velocity from that of the main branch and, where guidance acts, that of the weak one."""
    if len(velocities) == 1:
        return velocities[0]
    main, weak = velocities
    # Anchored at the main branch: where both agree, guidance changes not even a rounding.
    return main + (scale - 1) * (main - weak)
