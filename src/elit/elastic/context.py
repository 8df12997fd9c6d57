"""The blocks that decide how elastified transformers run: `elit.budget`, the branch of guidance, the original alone."""

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from elit.budgets import ANY_COUNT, Schedule, budget_block, is_list, resolve_budget, schedule_budgets

T = TypeVar("T")
UNSET: Any = object()

_branch: ContextVar[str | None] = ContextVar("elit_branch", default=None)
_block: Any = budget_block
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
    """Counted from 0."""
    timestep: float | None = None
    """The timestep of that step."""
    last: "weakref.ref[Tensor] | None" = None
    """The sample of a first branch that may have a second one."""

    def is_second(self, sample: Tensor) -> bool:
        """True where a sample comes for the second time in a row, as it does for a second branch of guidance."""
        second = self.last is not None and self.last() is sample
        self.last = None if second else weakref.ref(sample)
        return second

    def resolve(
        self, schedule: Schedule, budgets: Sequence[int], noise: Callable[[], Tensor], frame: FrameType | None
    ) -> int:
        """The budget of one forward, of a noise level, called by the pipeline of `frame`."""
        if isinstance(schedule, Sequence) and not isinstance(schedule, str):
            # In the pipeline's own precision: two steps may share a timestep in bfloat16.
            timestep = pipeline_timestep(frame) if frame is not None else None
            timestep = noise().flatten()[-1].item() if timestep is None else timestep
            # The network may be called more than once for a timestep: by a second-order scheduler, for each branch of
            # guidance, and by one transformer after the other (Wan 2.2 has two).
            if timestep != self.timestep:
                self.step, self.timestep = self.step + 1, timestep
            if self.step >= len(schedule):
                raise ValueError(
                    f"budget must be one a step, got a list of {len(schedule)} budgets in step {self.step + 1} of a "
                    "`with`; enter it anew for each run"
                )
            schedule = schedule[self.step]
        elif callable(schedule) or (isinstance(schedule, str) and "@" in schedule):
            # Rounded: timesteps come in float32 or less, and t = 0.5 must not fall short of "@0.5-1".
            t = round(1 - noise().flatten()[-1].item(), 4)
            schedule = schedule_budgets(schedule, [min(max(t, 0.0), 1.0)], budgets)[0]
        latents = resolve_budget(schedule, budgets)
        assert latents is not None
        return latents


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
    return within(_block, BudgetBlock(value, guidance, reference, doubled))


def branch(name: str) -> AbstractContextManager[None]:
    """Marks the forwards inside as one branch of guidance, "cond" or "uncond", or as both, "cond_uncond".

    diffusers' guiders say "pred_uncond"; LTX-2's "uncond_stg" and "uncond_modality" are other branches, not that one.
    """
    return within(_branch, name.removeprefix("pred_"))


def original() -> AbstractContextManager[None]:
    """Runs elastified transformers without their interface inside the block: a teacher's forward, on shared weights."""
    return within(bypassed, True)


def current_branch() -> str | None:
    """The branch of guidance that runs now; None where pipelines run both in one batch."""
    return _branch.get()


def has_guidance_budget() -> bool:
    """True where the unconditional branch has a budget of its own."""
    block: BudgetBlock | None = _block.get()
    return block is not None and block.guidance is not UNSET


@torch.compiler.disable
def budget_of_references(budgets: Sequence[int], noise: Callable[[], Tensor]) -> int | None:
    """J̃ of reference images in one forward; None where they have no budget of their own."""
    block: BudgetBlock | None = _block.get()
    if block is None or block.reference is UNSET:
        return None
    return block.resolve(block.reference, budgets, noise, calling_pipeline())


@torch.compiler.disable
def budgets_of_call(
    budgets: Sequence[int],
    noise: Callable[[], Tensor],
    half: int | None,
    *,
    one_branch: bool = False,
    unlabelled: Tensor | None = None,
) -> list[int]:
    """J̃ of one forward; two of them, for the first and the second half of the batch, where it holds both branches.

    noise: gives the noise level, any shape. half: which one is unconditional; None if a pipeline runs the branches
    apart. one_branch: this forward is of the conditional branch alone, whatever the pipeline does otherwise.
    unlabelled: the sample, where pipelines run the branches apart and may name neither.
    Raises ValueError for a budget out of range, too short a list, and where the branches in a batch are unknown.
    """
    block: BudgetBlock | None = _block.get()
    if block is None:
        return [budgets[-1]]
    frame, name = calling_pipeline(), _branch.get()
    main = block.resolve(block.value, budgets, noise, frame)
    if name is None and unlabelled is not None and frame is not None and block.is_second(unlabelled):
        name = "uncond"
    if block.guidance is UNSET or one_branch or (half is None and name != "uncond"):
        return [main]
    if half is not None:
        doubled = has_guidance(frame) if block.doubled is None and frame is not None else block.doubled
        if name in (None, "cond_uncond") and doubled is None:
            raise ValueError(
                "doubled must be given where no diffusers pipeline calls the transformer: True if its batches hold "
                "both branches of guidance, else False"
            )
        if name not in (None, "cond_uncond") or not doubled:
            return [main]
    weak = block.resolve(block.guidance, budgets, noise, frame)
    if half is None:
        return [weak]
    return [weak, main] if half == 0 else [main, weak]


def calling_pipeline() -> FrameType | None:
    """The frame of the `__call__` of the innermost pipeline that is running in this thread, if there is one."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "__call__" and isinstance(frame.f_locals.get("self"), DiffusionPipeline):
            return frame
        frame = frame.f_back
    return None


def has_guidance(frame: FrameType) -> bool | None:
    """True where the pipeline of that `__call__` runs an unconditional branch; None if it does not say.

    Raises ValueError for perturbed attention guidance, whose batch has three branches or two others.
    """
    names = frame.f_locals
    pipeline = names["self"]
    if getattr(pipeline, "do_perturbed_attention_guidance", False):
        raise ValueError(
            f"guidance is not supported for {type(pipeline).__name__}, which perturbs attention in another branch; "
            "leave it out, so that all branches run at one budget"
        )
    for name in ("apply_cfg", "do_classifier_free_guidance"):  # Z-Image, which can stop guiding early; PixArt
        if name in names:
            return bool(names[name])
    if hasattr(pipeline, "do_classifier_free_guidance"):  # Stable Diffusion 3
        return bool(pipeline.do_classifier_free_guidance)
    scale = names.get("guidance_scale")  # DiT
    return None if scale is None else scale > 1


def pipeline_timestep(frame: FrameType) -> float | None:
    """The timestep at which that `__call__` is, in the scheduler's own unit and precision; None if it does not say."""
    t = frame.f_locals.get("t")
    one = isinstance(t, int | float) or (isinstance(t, torch.Tensor) and t.numel() == 1)
    return float(t) if one else None
