"""The blocks that decide how elastified transformers run: `elit.budget`, the branch of guidance, the original alone."""

import inspect
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from elit.budgets import ANY_COUNT, Schedule, budget_block, is_list, resolve_budget, schedule_budgets
from elit.elastic.families.family import Arguments, Family

T = TypeVar("T")
UNSET: Any = object()

current_branch: ContextVar[str | None] = ContextVar("elit_branch", default=None)
"""The branch of guidance that runs now; None where pipelines run both in one batch."""
current_block: Any = budget_block
bypassed: ContextVar[bool] = ContextVar("elit_bypassed", default=False)


@contextmanager
def within(variable: ContextVar[T], value: T) -> Iterator[None]:
    """The variable has that value inside the block."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@dataclass
class BudgetBlock:
    """The settings of one `with elit.budget` block, and the step of the run inside it."""

    value: Schedule
    guidance: Schedule
    reference: Schedule
    doubled: bool | None
    step: int = -1
    timestep: float | None = None
    last: "weakref.ref[Tensor] | None" = None  # The sample of a first branch that may have a second one.

    def resolve(self, schedule: Schedule, budgets: Sequence[int], noise: Tensor, frame: FrameType | None) -> int:
        """The budget of one forward, of a noise level, called by the pipeline of `frame`."""
        if isinstance(schedule, Sequence) and not isinstance(schedule, str):
            # In the pipeline's own scheduler's unit and precision: two steps may share a timestep in bfloat16.
            t = None if frame is None else frame.f_locals.get("t")
            one = isinstance(t, int | float) or (isinstance(t, Tensor) and t.numel() == 1)
            timestep = float(cast(float, t)) if one else noise.flatten()[-1].item()
            # The network may be called more than once for a timestep: by a second-order scheduler, for each branch of
            # guidance, and by one transformer after the other (Wan 2.2 has two).
            if timestep != self.timestep:
                self.step, self.timestep = self.step + 1, timestep
            if self.step >= len(schedule):
                given = f"a list of {len(schedule)} budgets in step {self.step + 1} of a `with`"
                raise ValueError(f"budget must be one a step, got {given}; enter it anew for each run")
            schedule = schedule[self.step]
        elif callable(schedule) or (isinstance(schedule, str) and "@" in schedule):
            # Rounded: timesteps come in float32 or less, and t = 0.5 must not fall short of "@0.5-1".
            t = round(1 - noise.flatten()[-1].item(), 4)
            schedule = schedule_budgets(schedule, [min(max(t, 0.0), 1.0)], budgets)[0]
        return cast(int, resolve_budget(schedule, budgets))


def budget(
    value: Schedule, *, guidance: Schedule = UNSET, reference: Schedule = UNSET, doubled: bool | None = None
) -> AbstractContextManager[None]:
    """Sets the budget of elastified transformers inside the block; outside, they run at full budget.

    value: latents per window (int), a share of them (float), None for all, a schedule over t
    ("50%@0-0.5,100%@0.5-1") or a function of t (t = 0 noise, 1 data: 1 − the pipeline's noise level), or a list with
    one budget for each step: a step is a timestep, however often the network is called for it.
    guidance: the same for the unconditional branch (CCFG, paper section 4); if not given, it runs at `value`.
    reference: the same for reference images, where a model has some in its sequence (Qwen-Image-Edit, Flux Kontext,
    Flux 2), in both branches; if not given, they run at their branch's budget.
    doubled: whether each batch holds both branches of guidance. A diffusers pipeline knows it; give it where
    something else calls a transformer whose pipelines run both branches in one batch.

    Schedules and lists read the timestep of each forward, which waits for the device; a constant does not.
    Raises ValueError for invalid budgets; a budget out of a model's range is raised by its forward.
    """
    for schedule in (value, guidance, reference):
        if schedule is not UNSET and not callable(schedule):
            steps = len(schedule) if isinstance(schedule, Sequence) and is_list(schedule) else 1
            schedule_budgets(schedule, [0.0] * steps, ANY_COUNT)
    return within(current_block, BudgetBlock(value, guidance, reference, doubled))


def original() -> AbstractContextManager[None]:
    """Runs elastified transformers without their interface inside the block: a teacher's forward, on shared weights."""
    return within(bypassed, True)


@torch.compiler.disable
def budgets_of_call(family: Family, arguments: Arguments, budgets: Sequence[int]) -> tuple[list[int], int | None]:
    """Budgets of one forward, of both halves of a batch with both branches; and of references, where they have one."""
    block: BudgetBlock | None = current_block.get()
    if block is None:
        return [budgets[-1]], None
    frame, name, half = calling_pipeline(), current_branch.get(), family.unconditional_half
    noise = family.noise(arguments)
    main = block.resolve(block.value, budgets, noise, frame)
    reference = None if block.reference is UNSET else block.resolve(block.reference, budgets, noise, frame)
    if name is None and family.unlabelled_branches and frame is not None:
        # A sample that comes for the second time in a row comes for the second branch.
        sample = arguments[family.sample]
        second = block.last is not None and block.last() is sample
        block.last, name = None if second else weakref.ref(sample), "uncond" if second else None
    # Stable Diffusion 3 guides by skipping layers in a forward of the conditional branch alone.
    one_branch = arguments.get("skip_layers") is not None
    if block.guidance is UNSET or one_branch or (half is None and name != "uncond"):
        return [main], reference
    if half is not None:
        doubled = has_guidance(frame) if block.doubled is None and frame is not None else block.doubled
        if name in (None, "cond_uncond") and doubled is None:
            wanted = "True if its batches hold both branches of guidance, else False"
            raise ValueError(f"doubled must be given where no diffusers pipeline calls the transformer: {wanted}")
        if name not in (None, "cond_uncond") or not doubled:
            return [main], reference
    weak = block.resolve(block.guidance, budgets, noise, frame)
    return {None: [weak], 0: [weak, main], 1: [main, weak]}[half], reference


def calling_pipeline(method: str = "__call__") -> FrameType | None:
    """The frame of the `method` of the innermost pipeline that is running in this thread, if there is one."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == method and isinstance(frame.f_locals.get("self"), DiffusionPipeline):
            return frame
        frame = frame.f_back
    return None


def has_guidance(frame: FrameType) -> bool | None:
    """True where the pipeline of that `__call__` runs an unconditional branch; None if it does not say."""
    names = frame.f_locals
    pipeline = names["self"]
    if getattr(pipeline, "do_perturbed_attention_guidance", False):  # three branches in a batch, or two others
        reason = "which perturbs attention in another branch; leave it out, so that all branches run at one budget"
        raise ValueError(f"guidance is not supported for {type(pipeline).__name__}, {reason}")
    for name in ("apply_cfg", "do_classifier_free_guidance"):  # Z-Image, which can stop guiding early; PixArt
        if name in names:
            return bool(names[name])
    if hasattr(pipeline, "do_classifier_free_guidance"):  # Stable Diffusion 3
        return bool(pipeline.do_classifier_free_guidance)
    scale = names.get("guidance_scale")  # DiT
    return None if scale is None else scale > 1
