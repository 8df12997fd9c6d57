"""What a step of a service takes: milliseconds of one forward over the images in progress. Pure numbers, no torch.

ms(step) = call + core · (different budgets) + Σ over branches of (around + linear·J̃ + square·J̃²)

is the planner's cost model (`elit profile`) for a batch whose budgets are mixed.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

Rung = tuple[int, int | None]
"""Steps, and latents per group; None for a network without a dial."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What an image is computed with."""

    steps: int
    budget: int | None = None
    """Latents per group; None for a network without a dial."""
    weak_budget: int | None = None
    """Latents per group of guidance's second branch; None = as many as the main branch."""
    guided: bool = False
    """Whether there is a second branch."""

    @cached_property
    def branches(self) -> tuple[int, ...]:
        """Latents per group of every branch of a step."""
        main = self.budget or 0
        return (main, self.weak_budget or main) if self.guided else (main,)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Prices in milliseconds."""

    call: float
    """A forward, whatever is in it."""
    core: float = 0.0
    """Each different budget of a forward, whose core runs on its own."""
    around: float
    """A branch of an image, beside what rises with its latents."""
    linear: float = 0.0
    """A latent per group of a branch."""
    square: float = 0.0
    """The same, squared: attention among the latents."""
    image: float = 0.0
    """Once an image: noise, decoding, writing the picture."""
    overlapping: bool = False
    """Whether calls and work go on side by side, as on a GPU, so that the longer one counts."""
    separate: bool = False
    """Whether every image has a forward of its own, as where bytes must not depend on the batch."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float | int) and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"costs: {name}={value}; give milliseconds, 0 or more")
        if self.call + self.around <= 0:
            raise ValueError("costs: call and around are 0; a forward takes some time")

    def work(self, setting: Setting) -> float:
        """Milliseconds of work of one image in one step."""
        return sum(self.around + self.linear * count + self.square * count**2 for count in setting.branches)

    def step_ms(self, running: Iterable[tuple[Setting, int]]) -> float:
        """One step of all that runs: (setting, images) each."""
        if self.separate:
            return sum(images * self._forward(set(s.branches), self.work(s)) for s, images in running)
        work, lengths = 0.0, set[int]()
        for setting, images in running:
            work += images * self.work(setting)
            lengths.update(setting.branches)
        return self._forward(lengths, work) if lengths else 0.0

    def _forward(self, lengths: set[int], work: float) -> float:
        calls = self.call + self.core * len(lengths)
        return max(calls, work) if self.overlapping else calls + work

    def alone_ms(self, setting: Setting, images: int = 1) -> float:
        """A whole request with nothing beside it."""
        return setting.steps * self.step_ms([(setting, images)]) + images * self.image

    def rate(self, setting: Setting, batch: int) -> float:
        """Images a second with `batch` of them always in progress."""
        return 1e3 * batch / (setting.steps * self.step_ms([(setting, batch)]) + batch * self.image)

    def scaled(self, factor: float) -> "Costs":
        """All prices times `factor`: a machine that is slower by it."""
        prices = {name: value * factor for name, value in vars(self).items() if type(value) is not bool}
        return replace(self, **prices)


def efficient_batch(costs: Costs, setting: Setting, most: int, share: float = 0.9) -> int:
    """The fewest images in progress that reach `share` of the best rate of up to `most`: more only make all wait."""
    best = max(costs.rate(setting, batch) for batch in range(1, most + 1))
    return next(batch for batch in range(1, most + 1) if costs.rate(setting, batch) >= share * best)


def ladder(
    budgets: Sequence[int], *, steps: int, least: int | None = None, least_steps: int | None = None, rungs: int = 8
) -> tuple[Setting, ...]:
    """Settings from the cheapest to the dearest: at most `rungs` budgets from `least` to all at `steps`, and below
    them, down to `least_steps`, fewer steps at the least budget.

    budgets: of the network, ascending; () for one without a dial. Raises ValueError for a floor that is none.
    """
    floor_steps = steps if least_steps is None else least_steps
    if not 1 <= floor_steps <= steps:
        raise ValueError(f"least_steps={least_steps}: give 1 to {steps}")
    usable = [count for count in budgets if least is None or count >= least]
    if budgets and not usable:
        raise ValueError(f"least_budget={least}: give at most {budgets[-1]}, the network's full budget")
    spaced = spread(usable, rungs)
    low: int | None = spaced[0] if spaced else None
    fewer = [Setting(steps=count, budget=low) for count in spread(range(floor_steps, steps), max(1, rungs // 2))]
    return (
        (*fewer, *(Setting(steps=steps, budget=count) for count in spaced))
        if spaced
        else (*fewer, Setting(steps=steps))
    )


def spread(values: Sequence[int], count: int) -> list[int]:
    """At most `count` of ascending values, evenly, the first and the last among them."""
    if len(values) <= count:
        return list(values)
    if count == 1:
        return [values[0]]
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def costs_of_profile(profile: dict[str, Any]) -> Costs:
    """The prices of a profile's JSON. Raises ValueError where it has none, or no anatomy of the network."""
    try:
        prices, anatomy = profile["cost"]["prices"], profile["anatomy"]
        return Costs(
            call=prices["call"],
            core=prices["core"],
            around=prices["around"] * anatomy["around"],
            linear=prices["linear"] * anatomy["linear"],
            square=prices["attention"] * anatomy["square"],
            image=prices["image"],
            overlapping=profile["cost"]["overlapping"],
        )
    except (KeyError, TypeError):
        raise ValueError("profile: damaged, or of an older version; make it again with elit profile MODEL") from None


def read_costs(path: Path) -> tuple[Costs, tuple[int, ...]]:
    """Prices and budgets of a file that elit profile wrote. Raises ValueError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return costs_of_profile(content), tuple(content["anatomy"]["budgets"])
    except FileNotFoundError:
        raise ValueError(f"profile={str(path)!r}: no such file; elit profile MODEL writes one") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise ValueError(f"profile={str(path)!r}: damaged, or of an older version; make it again") from None
