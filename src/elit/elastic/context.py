"""The blocks that decide how elastified transformers run: `elit.budget`, the branch of guidance, the original alone."""

import inspect
import warnings
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

from elit import compat
from elit.budgets import ANY_COUNT, Schedule, budget_block, is_list, resolve_budget, schedule_budgets
from elit.elastic.families.family import Arguments, Family

T = TypeVar("T")
UNSET: Any = object()
REPLACED = "what replaces it (cache-dit, TeaCache) goes with no dial; transformer.enable_cache does"

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
    used: bool = False  # A transformer has run inside it.
    step: int = 0  # A loop's without pipeline; `level` is its noise level, `count` the length of its list.
    level: float = -1.0
    count: int = 1
    last: "weakref.ref[Tensor] | None" = None  # The sample of a first branch that may have a second one.

    def step_of(self, count: int, noise: Tensor, frame: FrameType | None) -> int:
        """The step of a forward, where there are `count` budgets: by its place among the scheduler's timesteps."""
        names: Arguments = {} if frame is None else frame.f_locals
        t, scheduler = names.get("t"), getattr(names.get("self"), "scheduler", None)
        if scheduler is not None and (isinstance(t, int | float) or (isinstance(t, Tensor) and t.numel() == 1)):
            every, own = scheduler.timesteps.tolist(), names.get("timesteps")
            own = own.tolist() if isinstance(own, Tensor) and own.ndim else []
            steps = getattr(scheduler, "num_inference_steps", None) or len(set(every))
            if count not in (steps, len(set(every))) and own == every[-len(own) :]:  # image to image: its last ones
                every = own
            if count in (steps, len(set(every))):
                distinct = list(dict.fromkeys(every))
                place = min(range(len(distinct)), key=lambda i: abs(distinct[i] - float(cast(float, t))))
                return place * count // len(distinct)
            raise ValueError(f"budget must be one a step, got a list of {count} budgets for {steps} steps")
        level, self.count = noise.flatten()[-1].item(), count
        if level != self.level:
            self.step, self.level = self.step + 1 if level < self.level else 0, level
        if self.step >= count:
            raise ValueError(f"budget must be one a step, got a list of {count} budgets in step {self.step + 1}")
        return self.step

    def resolve(self, schedule: Schedule, budgets: Sequence[int], noise: Tensor, frame: FrameType | None) -> int:
        """The budget of one forward, of a noise level, called by the pipeline of `frame`."""
        if isinstance(schedule, Sequence) and not isinstance(schedule, str):
            schedule = schedule[self.step_of(len(schedule), noise, frame)]
        elif callable(schedule) or (isinstance(schedule, str) and "@" in schedule):
            # Rounded: timesteps come in float32 or less, and t = 0.5 must not fall short of "@0.5-1".
            t = round(1 - noise.flatten()[-1].item(), 4)
            schedule = schedule_budgets(schedule, [min(max(t, 0.0), 1.0)], budgets)[0]
        return cast(int, resolve_budget(schedule, budgets))


@contextmanager
def budget(
    value: Schedule, *, guidance: Schedule = UNSET, reference: Schedule = UNSET, doubled: bool | None = None
) -> Iterator[None]:
    """Sets the budget of elastified transformers inside the block; outside, they run at full budget.

    value: latents per window (int), a share of them (float), None for all, a schedule over t
    ("50%@0-0.5,100%@0.5-1") or a function of t (t = 0 noise, 1 data: 1 − the pipeline's noise level), or a list with
    one budget for each step: a step is a timestep, however often the network is called for it. With image to image
    that is one for each of the scheduler's steps, or for each that runs.
    guidance: the same for the unconditional branch (CCFG, paper section 4); if not given, it runs at `value`.
    reference: the same for reference images, where a model has some in its sequence (Qwen-Image-Edit, Flux Kontext,
    Flux 2), in both branches; if not given, they run at their branch's budget.
    doubled: whether each batch holds both branches of guidance. A diffusers pipeline knows it; give it where
    something else calls a transformer whose pipelines run both branches in one batch.

    Schedules and lists read the timestep of each forward, which waits for the device; a constant does not.
    Raises ValueError for invalid budgets; a budget out of a model's range is raised by its forward. Warns on leaving
    the block if no elastified transformer has run in it: without a dial, or in another thread, it has no effect.
    """
    for schedule in (value, guidance, reference):
        if schedule is not UNSET and not callable(schedule):
            steps = len(schedule) if isinstance(schedule, Sequence) and is_list(schedule) else 1
            schedule_budgets(schedule, [0.0] * steps, ANY_COUNT)
    block = BudgetBlock(value, guidance, reference, doubled)
    with within(current_block, block):
        yield
    if not block.used:
        advice = "elit.elastify or elit.load_elastic gives it a dial, and each thread needs a block of its own"
        warnings.warn(f"elit.budget had no effect: no elastified transformer ran inside; {advice}", stacklevel=3)
    if block.count > block.step + 1:
        raise ValueError(f"budget must be one a step, got a list of {block.count} budgets for {block.step + 1} steps")


def original() -> AbstractContextManager[None]:
    """Runs elastified transformers without their interface inside the block: a teacher's forward, on shared weights."""
    return within(bypassed, True)


@torch.compiler.disable
def budgets_of_call(family: Family, arguments: Arguments, budgets: Sequence[int]) -> tuple[list[int], int | None]:
    """Budgets of one forward, of both halves of a batch with both branches; and of references, where they have one."""
    block: BudgetBlock | None = current_block.get()
    if block is None:
        return [budgets[-1]], None
    frame, half = calling_pipeline(), family.unconditional_half
    name, noise = current_branch.get() or compat.guided_branch(inspect.currentframe()), family.noise(arguments)
    main = block.resolve(block.value, budgets, noise, frame)
    reference = None if block.reference is UNSET else block.resolve(block.reference, budgets, noise, frame)
    if name is None and family.unlabelled_branches and frame is not None:
        # A sample that comes for the second time in a row comes for the second branch.
        sample = arguments[family.sample]
        second = block.last is not None and block.last() is sample
        block.last, name = None if second else weakref.ref(sample), "uncond" if second else "cond"
    # Stable Diffusion 3 guides by skipping layers in a forward of the conditional branch alone.
    if block.guidance is UNSET or arguments.get("skip_layers") is not None:
        return [main], reference
    weak = block.resolve(block.guidance, budgets, noise, frame)
    if name not in (None, "cond_uncond"):
        return [weak if name == "uncond" else main], reference
    doubled = has_guidance(frame) if half is not None and block.doubled is None and frame is not None else block.doubled
    if doubled is None or (doubled and half is None):
        wanted = "run each branch in transformer.cache_context('cond') or ('uncond'), or pass doubled=False for one"
        if half is not None:
            wanted = "pass doubled=True if its batches hold both branches of guidance, else False"
        raise ValueError(f"doubled must be given where no diffusers pipeline tells the branches: {wanted}")
    return ({None: [main], 0: [weak, main], 1: [main, weak]}[half] if doubled else [main]), reference


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
