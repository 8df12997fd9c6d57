"""The budget that a `with elit.budget(...)` block sets, and which of it one forward gets."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from elit.budgets import Schedule, resolve_budget, schedule_budgets

ANY = range(1, 1 << 31)


@dataclass(frozen=True)
class Setting:
    """What one `with` block asks for, and how far each transformer is in it."""

    value: Schedule
    guidance: Schedule
    has_guidance: bool
    steps: WeakKeyDictionary[nn.Module, Counter[str | None]] = field(default_factory=WeakKeyDictionary)
    doubled: WeakKeyDictionary[nn.Module, dict[int, bool]] = field(default_factory=WeakKeyDictionary)

    def next_step(self, transformer: nn.Module, branch: str | None) -> int:
        """The number of this forward of a branch, counted from 0."""
        counts = self.steps.setdefault(transformer, Counter())
        counts[branch] += 1
        return counts[branch] - 1

    def is_doubled(self, transformer: nn.Module, tokens: Tensor) -> bool:
        """Whether a batch is the same samples twice, as pipelines hand in both branches.

        Compared once a batch size: on an accelerator that waits for it, which no step after the first should.
        """
        known = self.doubled.setdefault(transformer, {})
        if len(tokens) not in known:
            half, odd = divmod(len(tokens), 2)
            known[len(tokens)] = not odd and torch.equal(tokens[:half], tokens[half:])
        return known[len(tokens)]


_setting: ContextVar[Setting | None] = ContextVar("elit_budget", default=None)
_branch: ContextVar[str | None] = ContextVar("elit_branch", default=None)
_MAIN: Any = object()


@contextmanager
def budget(value: Schedule, *, guidance: Schedule = _MAIN) -> Iterator[None]:
    """Sets the budget of elastified transformers inside the block; outside, they run at full budget.

    value: latents per window (int), a share of them (float), None for all, a schedule over t ("0.5@0-0.5,1@0.5-1") or
    a function of t (t = 0 noise, 1 data: 1 − the noise level that the pipeline hands in), or a list with one budget for
    each forward of a branch. guidance: the same for the unconditional branch (CCFG, paper section 4); if not given, it
    runs at `value`.

    A schedule over t reads the timestep of each forward, which waits for the device; a list does not.
    Raises ValueError for what cannot be a budget; what is out of a model's range is raised by its forward.
    """
    for schedule in (value, *(() if guidance is _MAIN else (guidance,))):
        _check(schedule)
    token = _setting.set(Setting(value, value if guidance is _MAIN else guidance, guidance is not _MAIN))
    try:
        yield
    finally:
        _setting.reset(token)


@contextmanager
def branch(name: str) -> Iterator[None]:
    """Marks the forwards inside as one branch of guidance, "cond" or "uncond"."""
    token = _branch.set(name)
    try:
        yield
    finally:
        _branch.reset(token)


@torch.compiler.disable
def kept_of_call(
    transformer: nn.Module, budgets: Sequence[int], tokens: Tensor, noise: Callable[[], Tensor], half: int | None
) -> list[int]:
    """J̃ of one forward; two of them, for the first and the second half of the batch, where it holds both branches.

    half: which one is unconditional; None if a pipeline runs the branches apart. Raises ValueError for a budget out of
    range and for a list that is too short.
    """
    setting, name = _setting.get(), _branch.get()
    if setting is None:
        return [budgets[-1]]
    step = setting.next_step(transformer, name)
    main = _resolve(setting.value, budgets, step, noise)
    if not setting.has_guidance or (half is None and name != "uncond"):
        return [main]
    if half is not None and not setting.is_doubled(transformer, tokens):
        return [main]
    guidance = _resolve(setting.guidance, budgets, step, noise)
    if half is None:
        return [guidance]
    return [guidance, main] if half == 0 else [main, guidance]


def _resolve(schedule: Schedule, budgets: Sequence[int], step: int, noise: Callable[[], Tensor]) -> int:
    if isinstance(schedule, Sequence) and not isinstance(schedule, str):
        if step >= len(schedule):
            raise ValueError(
                f"budget: a list of {len(schedule)} budgets, and this is forward {step + 1} inside the `with`; give "
                "one a step, and enter it anew for each run"
            )
        schedule = schedule[step]
    elif callable(schedule) or (isinstance(schedule, str) and "@" in schedule):
        # Rounded: timesteps come in float32 or less, and t = 0.5 must not fall short of "@0.5-1".
        t = round(1 - noise().flatten()[-1].item(), 4)
        schedule = schedule_budgets(schedule, [min(max(t, 0.0), 1.0)], budgets)[0]
    kept = resolve_budget(schedule, budgets)
    assert kept is not None
    return kept


def _check(schedule: Schedule) -> None:
    if callable(schedule):
        return
    if isinstance(schedule, Sequence) and not isinstance(schedule, str):
        for value in schedule:
            resolve_budget(value, ANY)
    else:
        schedule_budgets(schedule, [0.0], ANY)
