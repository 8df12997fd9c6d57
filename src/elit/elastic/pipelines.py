"""A diffusers pipeline as distillation uses it: loaded, and called for batches of prompts."""

import ast
import inspect
import math
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch
from torch import nn

from elit.config import DistillConfig
from elit.elastic.families import family_of
from elit.elastic.families.family import Pipeline
from elit.elastic.trees import Arguments
from elit.models.saved import check_hub_name, quiet_loading
from elit.sampling.autoencoders import downsampling

Size = tuple[int, int]
"""(height, width) in pixels."""
OURS = ("prompt", "class_labels", "height", "width", "num_inference_steps", "generator", "output_type", "return_dict")
"""Arguments of a pipeline's call that distillation sets itself."""


def load_pipeline(config: DistillConfig, device: torch.device) -> Pipeline:
    """The pipeline on `device`. Raises ValueError where there is none, or no single transformer to train."""
    name = config.pipeline
    check_hub_name("pipeline", name)
    precision = config.base_precision or ("fp32" if config.weights == "all" else config.precision)
    try:
        with quiet_loading():
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                name, torch_dtype=torch.bfloat16 if precision == "bf16" else torch.float32
            )
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"cannot load pipeline {name!r}: {reason}; give a folder or a hub name") from None
    check_transformer(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def check_transformer(pipe: Pipeline) -> None:
    """Raises ValueError for a pipeline without a transformer of a known class, and with two of them."""
    kind, transformer = type(pipe).__name__, getattr(pipe, "transformer", None)
    if not isinstance(transformer, nn.Module):
        has = ", ".join(part for part, value in pipe.components.items() if isinstance(value, nn.Module))
        raise ValueError(f"pipeline must have a transformer, got a {kind} with {has}")
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError(f"pipeline must have one transformer, got a {kind} with two; not supported for those yet")
    family_of(transformer)


def read_prompts(path: str | None) -> list[str]:
    """The lines of a prompt file, empty ones left out. Raises ValueError."""
    if path is None:
        raise ValueError("prompts must be a text file with a prompt a line, unless pictures are given as data")
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ValueError(f"cannot read prompts {path!r}: {reason}; give a file with a prompt a line") from None
    if not (prompts := [line for line in lines if line]):
        raise ValueError(f"prompts must have a prompt a line, got the empty file {path!r}")
    return prompts


def takes_classes(pipe: Pipeline) -> bool:
    return "class_labels" in inspect.signature(pipe.__call__).parameters


def cell_of(pipe: Pipeline) -> int:
    """Pixels of an autoencoder's cell along an axis."""
    return int(getattr(pipe, "vae_scale_factor", 0) or downsampling(pipe.vae))


def default_size(pipe: Pipeline) -> Size:
    """(height, width) of a call that names none: a square."""
    cells = getattr(pipe, "default_sample_size", None) or pipe.transformer.config.get("sample_size") or 128
    return cells * cell_of(pipe), cells * cell_of(pipe)


class Requests:
    """The calls of a pipeline, batch after batch: a function of the settings alone.

    Raises ValueError for arguments that this pipeline's call does not have.
    """

    def __init__(self, pipe: Pipeline, config: DistillConfig, prompts: list[str]):
        self.pipe, self.config = pipe, config
        self.known = inspect.signature(pipe.__call__).parameters
        self.call: Arguments = {}
        for each in config.call:
            name, _, value = each.partition("=")
            if name not in self.known or name in OURS:
                known = ", ".join(known for known in self.known if known not in OURS)
                raise ValueError(f"call must name arguments of {type(pipe).__name__} ({known}), got {each!r}")
            try:
                self.call[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                self.call[name] = value
        if "use_kv_cache" in self.known:  # Qwen-Image 2.1: what a step has left for the next is no argument of a call
            self.call.setdefault("use_kv_cache", False)
        if config.sizes and "height" not in self.known:
            raise ValueError(f"sizes must be left out for a {type(pipe).__name__}, which has one size")
        self.by_class = takes_classes(pipe)
        self.prompts = [self._class_number(each) if self.by_class else each for each in prompts]
        pairs = [each.split("x") for each in config.sizes if "x" in each]
        self.sizes: list[Size | None] = [(int(height), int(width)) for height, width in pairs]
        self.sides = [int(each) for each in config.sizes if "x" not in each]
        """Sides of squares as large as the sizes that are still to be added."""
        if not config.sizes:
            self.sizes = [None]

    @property
    def nothing(self) -> str | int:
        """The substitute for a prompt in the unconditional branch."""
        if self.by_class:
            return self.pipe.transformer.config.num_embeds_ada_norm
        return self.call.get("negative_prompt") or ""

    @property
    def guided(self) -> bool:
        """True where calls have an unconditional branch."""
        return "negative_prompt" in self.call

    def batches(self) -> Iterator[Arguments]:
        """The trajectories to record, `teacher_batch` of one size at a time."""
        config, size = self.config, self.config.teacher_batch
        total = len(self.prompts) if config.trajectories is None else config.trajectories
        for number in range(math.ceil(total / size)):
            rows = range(number * size, min(number * size + size, total))
            even = number // len(self.sizes) % 2 == 0  # so that each size has both
            steps = config.teacher_steps if even else max(1, config.teacher_steps * 3 // 4)
            yield self.request([self.prompts[row % len(self.prompts)] for row in rows], number=number, steps=steps)

    def validation(self, **changes: str) -> Arguments:
        """The first prompts, at the first size, always of the same seeds."""
        prompts = [self.prompts[row % len(self.prompts)] for row in range(self.config.preview_prompts)]
        return self.request(prompts, number=0, steps=self.config.teacher_steps) | changes

    def request(self, prompts: list[str | int], *, number: int, steps: int, size: Size | None = None) -> Arguments:
        """One call of the pipeline; number: decides seed and, where it is not given, size."""
        request: Arguments = {"class_labels" if self.by_class else "prompt": prompts, **self.call}
        request["num_inference_steps"] = steps
        if len(prompts) == 1 and not self.by_class:  # Wan VACE takes no lists
            request["prompt"] = prompts[0]
        elif isinstance(negative := request.get("negative_prompt"), str):
            request["negative_prompt"] = [negative] * len(prompts)
        size = size or self.sizes[number % len(self.sizes)]
        if size is not None and "height" in self.known:
            request |= {"height": size[0], "width": size[1]}
        request["output_type"] = "pt" if self.by_class else "latent"
        seed = self.config.seed * 1_000_003 + number
        return request | {"generator": torch.Generator().manual_seed(seed)}

    def _class_number(self, name: str) -> int:
        labels = getattr(self.pipe, "labels", {})
        if not name.isdigit() and name not in labels:
            raise ValueError(f"prompts must be labels of this pipeline's classes, or numbers, got {name!r}")
        return int(name) if name.isdigit() else labels[name]
