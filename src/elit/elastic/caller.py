"""The diffusers pipeline that calls a transformer: whether its run has guidance, and its timestep.

A pipeline gives its transformer tensors and nothing else. Two prompts that start from the same noise are then the same
batch as one prompt with both branches of guidance, and a timestep in bfloat16 may be that of two steps. The innermost
pipeline on the call stack knows: its `__call__` has the names that all of diffusers' pipelines have.
"""

import inspect
from types import FrameType
from typing import Any

import torch
from diffusers import DiffusionPipeline


def calling_pipeline() -> FrameType | None:
    """The frame of the `__call__` of the innermost pipeline that is running in this thread, if there is one."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "__call__" and isinstance(frame.f_locals.get("self"), DiffusionPipeline):
            return frame
        frame = frame.f_back
    return None


def has_guidance(frame: FrameType) -> bool | None:
    """Whether the pipeline of that `__call__` runs an unconditional branch; None if it does not say.

    Raises ValueError for perturbed attention guidance, whose batch has three branches or two others.
    """
    names = frame.f_locals
    pipeline = names["self"]
    if getattr(pipeline, "do_perturbed_attention_guidance", False):
        raise ValueError(
            f"guidance is not supported for {type(pipeline).__name__}, which perturbs attention in another branch; "
            "leave it out, so that all branches run at one budget"
        )
    if "apply_cfg" in names:  # Z-Image, which can stop guiding before the end
        return bool(names["apply_cfg"])
    if "do_classifier_free_guidance" in names:  # PixArt
        return bool(names["do_classifier_free_guidance"])
    if hasattr(pipeline, "do_classifier_free_guidance"):  # Stable Diffusion 3
        return bool(pipeline.do_classifier_free_guidance)
    scale = names.get("guidance_scale")  # DiT
    return None if scale is None else scale > 1


def pipeline_timestep(frame: FrameType) -> float | None:
    """The timestep at which that `__call__` is, in the scheduler's own unit and precision; None if it does not say."""
    t: Any = frame.f_locals.get("t")
    if isinstance(t, torch.Tensor):
        return t.item() if t.numel() == 1 else None
    return float(t) if isinstance(t, int | float) else None
