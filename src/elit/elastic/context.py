"""The budget that a `with elit.budget(...)` block sets, and which of it one forward gets."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from elit.budgets import ANY_COUNT, Schedule, budget_block, resolve_budget, schedule_budgets
from elit.elastic.caller import calling_pipeline, pipeline_guides, pipeline_timestep


@dataclass
class Setting:
    """What one `with` block asks for, and at which step the run inside it is."""

    value: Schedule
    guidance: Schedule
    has_guidance: bool
    doubled: bool | None
    step: int = -1
    """Counted from 0."""
    timestep: float | None = None
    """Of that step."""
    reference: Schedule = None
    has_reference: bool = False
    last: "weakref.ref[Tensor] | None" = None
    """The sample of a first branch that may have a second one."""

    def is_second(self, sample: Tensor) -> bool:
        """Whether a sample is handed in for the second time in a row, as it is for a second branch of guidance."""
        second = self.last is not None and self.last() is sample
        self.last = None if second else weakref.ref(sample)
        return second

    def step_at(self, timestep: float) -> int:
        """The step that runs at `timestep`. The network may be called for it more than once: by a second-order
        scheduler, for each branch of guidance, and by one transformer after the other (Wan 2.2 has two).
        """
        if timestep != self.timestep:
            self.step, self.timestep = self.step + 1, timestep
        return self.step


_setting: ContextVar[Setting | None] = budget_block
_branch: ContextVar[str | None] = ContextVar("elit_branch", default=None)
_MAIN: Any = object()


@contextmanager
def budget(
    value: Schedule, *, guidance: Schedule = _MAIN, reference: Schedule = _MAIN, doubled: bool | None = None
) -> Iterator[None]:
    """Sets the budget of elastified transformers inside the block; outside, they run at full budget.

    value: latents per window (int), a share of them (float), None for all, a schedule over t
    ("50%@0-0.5,100%@0.5-1") or a function of t (t = 0 noise, 1 data: 1 − the noise level that the pipeline hands in),
    or a list with one budget for each step: a step is a timestep, however often the network is called for it.
    guidance: the same for the unconditional branch (CCFG, paper section 4); if not given, it runs at `value`.
    reference: the same for pictures that are only looked at, where a model has some in its sequence (Qwen-Image-Edit,
    Flux Kontext, Flux 2), in both branches; if not given, they run at their branch's budget.
    doubled: whether each batch holds both branches of guidance. A diffusers pipeline says so itself; give it where
    something else calls a transformer whose pipelines run both branches in one batch.

    Schedules and lists read the timestep of each forward, which waits for the device; a constant does not.
    Raises ValueError for what cannot be a budget; what is out of a model's range is raised by its forward.
    """
    for schedule in (value, guidance, reference):
        if schedule is not _MAIN:
            _check(schedule)
    setting = Setting(value, value if guidance is _MAIN else guidance, guidance is not _MAIN, doubled)
    if reference is not _MAIN:
        setting.reference, setting.has_reference = reference, True
    token = _setting.set(setting)
    try:
        yield
    finally:
        _setting.reset(token)


def has_guidance_budget() -> bool:
    """Whether the unconditional branch has a budget of its own."""
    setting = _setting.get()
    return setting is not None and setting.has_guidance


@contextmanager
def branch(name: str) -> Iterator[None]:
    """Marks the forwards inside as one branch of guidance, "cond" or "uncond", or as both, "cond_uncond".

    diffusers' guiders say "pred_uncond"; LTX-2's "uncond_stg" and "uncond_modality" are other branches, not that one.
    """
    name = name.removeprefix("pred_")
    token = _branch.set(name)
    try:
        yield
    finally:
        _branch.reset(token)


def current_branch() -> str | None:
    """The branch of guidance that runs now; None where pipelines run both in one batch."""
    return _branch.get()


@torch.compiler.disable
def budget_of_references(budgets: Sequence[int], noise: Callable[[], Tensor]) -> int | None:
    """J̃ of pictures that are only looked at, in one forward; None where they have no budget of their own."""
    setting = _setting.get()
    if setting is None or not setting.has_reference:
        return None
    return _resolve(setting.reference, budgets, setting, noise, calling_pipeline())


@torch.compiler.disable
def budgets_of_call(
    budgets: Sequence[int],
    noise: Callable[[], Tensor],
    half: int | None,
    *,
    one_branch: bool = False,
    unnamed: Tensor | None = None,
) -> list[int]:
    """J̃ of one forward; two of them, for the first and the second half of the batch, where it holds both branches.

    noise: gives the noise level, any shape. half: which one is unconditional; None if a pipeline runs the branches
    apart. one_branch: this forward is of the conditional branch alone, whatever the pipeline does otherwise.
    unnamed: the sample, where pipelines run the branches apart and name neither.
    Raises ValueError for a budget out of range, a list that is too short, and where nobody says what a batch holds.
    """
    setting, name = _setting.get(), _branch.get()
    if setting is None:
        return [budgets[-1]]
    frame = calling_pipeline()
    main = _resolve(setting.value, budgets, setting, noise, frame)
    if name is None and unnamed is not None and frame is not None and setting.is_second(unnamed):
        name = "uncond"
    if not setting.has_guidance or one_branch or (half is None and name != "uncond"):
        return [main]
    if half is not None and (name not in (None, "cond_uncond") or not _is_doubled(setting, frame)):
        return [main]
    guidance = _resolve(setting.guidance, budgets, setting, noise, frame)
    if half is None:
        return [guidance]
    return [guidance, main] if half == 0 else [main, guidance]


def _is_doubled(setting: Setting, frame: FrameType | None) -> bool:
    """Whether a batch holds both branches."""
    says = setting.doubled
    if says is None and frame is not None:
        says = pipeline_guides(frame)
    if says is None:
        raise ValueError(
            "doubled: not given, and no diffusers pipeline calls this transformer; say whether its batches hold both "
            "branches of guidance, elit.budget(..., guidance=..., doubled=True), or one, doubled=False"
        )
    return says


def _resolve(
    schedule: Schedule, budgets: Sequence[int], setting: Setting, noise: Callable[[], Tensor], frame: FrameType | None
) -> int:
    if isinstance(schedule, Sequence) and not isinstance(schedule, str):
        # In the pipeline's own precision: two steps may share a timestep in bfloat16.
        timestep = pipeline_timestep(frame) if frame is not None else None
        step = setting.step_at(noise().flatten()[-1].item() if timestep is None else timestep)
        if step >= len(schedule):
            raise ValueError(
                f"budget: a list of {len(schedule)} budgets, and this is step {step + 1} inside the `with`; give one a "
                "step, and enter it anew for each run"
            )
        schedule = schedule[step]
    elif callable(schedule) or (isinstance(schedule, str) and "@" in schedule):
        # Rounded: timesteps come in float32 or less, and t = 0.5 must not fall short of "@0.5-1".
        t = round(1 - noise().flatten()[-1].item(), 4)
        schedule = schedule_budgets(schedule, [min(max(t, 0.0), 1.0)], budgets)[0]
    latents = resolve_budget(schedule, budgets)
    assert latents is not None
    return latents


def _check(schedule: Schedule) -> None:
    if callable(schedule):
        return
    if isinstance(schedule, Sequence) and not isinstance(schedule, str):
        for value in schedule:
            resolve_budget(value, ANY_COUNT)
    else:
        schedule_budgets(schedule, [0.0], ANY_COUNT)
