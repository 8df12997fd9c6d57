"""A diffusers pipeline as distillation uses it: loaded, and called for batches of prompts."""

import ast
import inspect
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from elit.config import DistillConfig
from elit.elastic.families import family_of
from elit.models.saved import check_hub_name, quiet_loading

OURS = ("prompt", "class_labels", "height", "width", "num_inference_steps", "generator", "output_type", "return_dict")
"""Arguments of a pipeline's call that distillation sets itself."""


def load_pipeline(config: DistillConfig, device: torch.device) -> Any:
    """The pipeline on `device`. Raises ValueError where there is none, or it has no transformer to train."""
    name = config.pipeline
    precision = config.base_precision or ("fp32" if config.weights == "all" else config.precision)
    try:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        with quiet_loading():
            pipe = diffusers.DiffusionPipeline.from_pretrained(name, torch_dtype=dtype)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"pipeline={name!r}: cannot be loaded ({reason}); give a folder or a hub name") from None
    transformer = getattr(pipe, "transformer", None)
    if not isinstance(transformer, nn.Module):
        has = ", ".join(part for part, value in pipe.components.items() if isinstance(value, nn.Module))
        raise ValueError(f"pipeline={name!r}: a {type(pipe).__name__} has no transformer, only {has}")
    family_of(transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def check_pipeline(name: str) -> None:
    """Raises ValueError for what can be no pipeline."""
    if not name:
        raise ValueError("pipeline: not given; elit distill PIPELINE OUT --prompts FILE")
    if Path(name).is_dir() and not (Path(name) / "model_index.json").is_file():
        raise ValueError(f"pipeline={name!r}: no model_index.json in it; give a folder that a pipeline was saved in")
    check_hub_name("pipeline", name)


def read_prompts(path: str | None) -> list[str]:
    """The lines of a prompt file, empty ones left out. Raises ValueError."""
    if path is None:
        raise ValueError("prompts: not given; give a text file with a prompt a line, or pictures as data")
    if not Path(path).is_file():
        raise ValueError(f"prompts={path!r}: no such file")
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"prompts={path!r}: is no UTF-8 text; give a file with a prompt a line") from None
    if not (prompts := [line for line in lines if line]):
        raise ValueError(f"prompts={path!r}: has no prompts; give a file with one a line")
    return prompts


class Requests:
    """What a pipeline is called with, batch after batch: a function of the settings alone.

    Raises ValueError for arguments that this pipeline's call does not know.
    """

    def __init__(self, pipe: Any, config: DistillConfig, prompts: list[str]):
        self.pipe, self.config = pipe, config
        self.known = self.parameters(pipe)
        self.call = {}
        for each in config.call:
            name, _, value = each.partition("=")
            if name in OURS:
                raise ValueError(f"call={each!r}: {name} is set by elit distill; leave it out")
            if name not in self.known:
                known = ", ".join(self.known)
                raise ValueError(f"call={each!r}: {type(pipe).__name__} takes no {name}; it takes {known}")
            try:
                self.call[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                self.call[name] = value
        if "use_kv_cache" in self.known:  # Qwen-Image 2.1: what a step has left for the next is no argument of a call
            self.call.setdefault("use_kv_cache", False)
        if config.sizes and "height" not in self.known:
            raise ValueError(f"sizes={config.sizes}: {type(pipe).__name__} has one size; leave it out")
        self.by_class = "class_labels" in self.known
        self.prompts: list[Any] = [self._class_number(each) for each in prompts] if self.by_class else prompts
        self.sizes: list[Any] = [tuple(map(int, each.split("x"))) for each in config.sizes if "x" in each]
        self.sides = [int(each) for each in config.sizes if "x" not in each]
        """Of squares as large as the sizes that are still to be added."""
        if not config.sizes:
            self.sizes = [None]

    @staticmethod
    def parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
        """What a pipeline's call takes."""
        return inspect.signature(pipe.__call__).parameters

    @property
    def nothing(self) -> Any:
        """What stands in a prompt's place in the unconditional branch."""
        if self.by_class:
            return self.pipe.transformer.config.num_embeds_ada_norm
        return self.call.get("negative_prompt") or ""

    @property
    def guided(self) -> bool:
        """Whether the pipeline is asked for an unconditional branch."""
        return "negative_prompt" in self.call

    def batches(self) -> Iterator[dict[str, Any]]:
        """The trajectories to record, `teacher_batch` of one size at a time."""
        config, size = self.config, self.config.teacher_batch
        total = len(self.prompts) if config.trajectories is None else config.trajectories
        for number in range(math.ceil(total / size)):
            rows = range(number * size, min(number * size + size, total))
            steps = config.teacher_steps if number % 2 == 0 else max(1, config.teacher_steps * 3 // 4)
            yield self.request([self.prompts[row % len(self.prompts)] for row in rows], number=number, steps=steps)

    def validation(self, **changes: Any) -> dict[str, Any]:
        """The first prompts, at the first size, always of the same seeds."""
        prompts = [self.prompts[row % len(self.prompts)] for row in range(self.config.preview_prompts)]
        return self.request(prompts, number=0, steps=self.config.teacher_steps) | changes

    def request(self, prompts: list[Any], *, number: int, steps: int, size: Any = None) -> dict[str, Any]:
        """One call of the pipeline; number: decides seed and, where it is not given, size."""
        request: dict[str, Any] = {"class_labels" if self.by_class else "prompt": prompts, **self.call}
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
        if name.isdigit():
            return int(name)
        labels = getattr(self.pipe, "labels", {})
        if name not in labels:
            raise ValueError(f"prompts: {name!r} is no class of this pipeline; give one of its labels, or a number")
        return labels[name]
