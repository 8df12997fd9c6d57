"""A service's ladder of settings, from the cheapest to full quality, and the parts of it that requests accept."""

from collections.abc import Sequence

from elit.budgets import evenly_spaced, resolve_budget
from elit.config import require
from elit.flow.guidance import CCFG, CFG, Guidance
from elit.sampling.settings import Sampling

Rung = tuple[int, int | None]
"""Steps, and latents per group; None for a network without a latent interface."""


def ladder_by_rule(
    budgets: Sequence[int], *, steps: int, least: int | None = None, least_steps: int | None = None
) -> tuple[Rung, ...]:
    """At most 8 budgets from `least` to all at `steps`, and below them fewer steps at the least budget.

    budgets: of the network, ascending; () without a latent interface. Raises ValueError for a floor that is too high.
    """
    floor_steps = steps if least_steps is None else least_steps
    require(1 <= floor_steps <= steps, "least_steps", least_steps, f"1 to {steps}")
    usable = [count for count in budgets if least is None or count >= least]
    require(not budgets or bool(usable), "least_budget", least, f"at most {max(budgets, default=0)}")
    spaced: Sequence[int | None] = evenly_spaced(usable, 8) or [None]
    fewer = [(count, spaced[0]) for count in evenly_spaced(range(floor_steps, steps), 4)]
    return (*fewer, *((steps, count) for count in spaced))


def make_guidance(scale: float, weak: int | float | str | None, budgets: Sequence[int]) -> Guidance | None:
    """Guidance of `scale` (1 is off), its second branch at `weak` (None = as the first). Raises ValueError."""
    if scale == 1:
        return None
    return CFG(scale) if weak is None else CCFG(scale, resolve_budget(weak, budgets))


def qualities(ladder: Sequence[Sampling]) -> dict[str, tuple[tuple[Sampling, ...], int]]:
    """The rungs of a ladder that low, medium, high and auto accept, and the place of their first.

    auto: all of them. high: the full setting alone. medium: from the middle up. low: up to the middle.
    """
    middle = len(ladder) // 2
    return {
        "auto": (tuple(ladder), 0),
        "low": (tuple(ladder[: middle + 1]), 0),
        "medium": (tuple(ladder[middle:]), middle),
        "high": (tuple(ladder[-1:]), len(ladder) - 1),
    }
