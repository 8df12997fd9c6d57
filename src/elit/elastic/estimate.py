"""What a distillation takes before it is started: memory of a device by part, FLOPs; from a transformer's config.

Known classes: those of `CALLS`, whose tokens are 16×16 pixels.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from elit.compat import fake_tensors
from elit.config import DistillConfig
from elit.costs.memory import saved_bytes
from elit.elastic.context import budget
from elit.elastic.cost import count_block_flops
from elit.elastic.distill import prepare_student, student_budgets
from elit.elastic.families import FAMILIES, all_blocks, family_of, registered
from elit.elastic.recording import output_tensor
from elit.elastic.token_order import make_token_order

DEFAULTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "Qwen/Qwen-Image": ("QwenImageTransformer2DModel", {}),
    "black-forest-labs/FLUX.1-dev": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "black-forest-labs/FLUX.1-schnell": ("FluxTransformer2DModel", {}),
    "black-forest-labs/FLUX.2-dev": ("Flux2Transformer2DModel", {}),
    "lodestones/Chroma1-HD": ("ChromaTransformer2DModel", {}),
    "Tongyi-MAI/Z-Image": ("ZImageTransformer2DModel", {}),
}
"""Pipelines whose transformer has its class's default sizes: known where the hub cannot be reached."""
PIXELS = 16


@dataclass(frozen=True, kw_only=True)
class Part:
    """Memory of one device in bytes, one way to train."""

    weights: str
    """lora, interface or all."""
    sharded: bool
    """FSDP2 over the devices, or a copy on each."""
    base: int
    """The pipeline's transformer."""
    trained: int
    """What is trained, in float32, and its average."""
    gradients: int
    optimizer: int
    activations: int
    """Of the largest budget drawn, every block kept."""
    activations_checkpointed: int
    """With gradient checkpointing."""

    @property
    def peak(self) -> int:
        """With gradient checkpointing."""
        return self.base + self.trained + self.gradients + self.optimizer + self.activations_checkpointed


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a distillation takes."""

    kind: str
    parameters: int
    blocks: int
    tokens: int
    text_tokens: int
    parts: tuple[Part, ...]
    tflops: float
    """Of a step with low-rank changes: forward, backward and, with gradient checkpointing, the forward again."""
    recording_tflops: float
    """Of all trajectories."""


def estimate(config: DistillConfig, *, devices: int, text_tokens: int = 512) -> Estimate:
    """From the config of a transformer; no weights are read. Raises ValueError where it is not to be had."""
    if devices < 1 or config.batch_size % (devices * config.gradient_accumulation):
        raise ValueError(
            f"devices={devices}: batch_size={config.batch_size} must divide into {config.gradient_accumulation} "
            "accumulated micro-batches on each of them"
        )
    make = transformer_maker(config.pipeline)
    size = config.sizes[0] if config.sizes else "1024x1024"
    height, width = (math.ceil(int(side) / PIXELS) for side in size.split("x"))
    batch = config.batch_size // devices // config.gradient_accumulation
    students = {weights: replace(config, weights=weights, budget_max=None) for weights in ("lora", "all")}
    parts, flops = [], {}
    for weights, settings in students.items():
        with (mode := fake_tensors(mixed=True)), in_bfloat16():
            student: Any = make()
            if type(student).__name__ not in CALLS:
                raise ValueError(f"dry_run: a {type(student).__name__} is not known to it; known: {', '.join(CALLS)}")
            prepare_student(student, settings)
        drawn = student_budgets(student, settings)
        grids = ((height, width),)
        costs = [count_block_flops(student, tokens=grids, text_tokens=text_tokens, budget=count) for count in drawn]
        flops[weights] = sum(costs) / len(costs)
        original = count_block_flops(student, tokens=grids, text_tokens=text_tokens, interface=False)
        trained = sum(weight.numel() for weight in student.parameters() if weight.requires_grad)
        base = sum(weight.numel() for name, weight in student.named_parameters() if not name.startswith("elastic."))
        plain, inputs = activations(mode, student, (height, width), batch, text_tokens, drawn[-1])
        blocks = len(all_blocks(student))
        for sharded in (False, True) if devices > 1 else (False,):
            share = devices if sharded else 1
            gathered = 2 * base // blocks * 2 if sharded else 0  # two blocks at a time, in bf16
            parts.append(
                Part(
                    weights=weights,
                    sharded=sharded,
                    base=(
                        2 * base // share if weights == "lora" else 2 * base * (not sharded or config.data is not None)
                    )
                    + gathered,
                    trained=8 * trained // share,
                    gradients=4 * trained // share,
                    optimizer=8 * trained // share,
                    activations=plain,
                    activations_checkpointed=inputs + (plain - inputs) // blocks,
                )
            )
    trajectories = config.trajectories or 0
    branches = 1 + any(each.startswith("negative_prompt=") for each in config.call)
    return Estimate(
        kind=type(student).__name__,
        parameters=base,
        blocks=blocks,
        tokens=height * width,
        text_tokens=text_tokens,
        parts=tuple(parts),
        tflops=(2 + config.gradient_checkpointing) * config.batch_size * flops["lora"] / 1e12,
        recording_tflops=trajectories * config.teacher_steps * branches * original / 1e12,
    )


def transformer_maker(name: str) -> Callable[[], nn.Module]:
    """Makes a pipeline's transformer from its config. Raises ValueError where that is not to be had."""
    path = Path(name) / "transformer" / "config.json"
    if not name:
        raise ValueError("pipeline: not given; elit distill PIPELINE OUT --dry-run")
    if Path(name).is_dir() and not path.is_file():
        raise ValueError(f"pipeline={name!r}: no transformer/config.json in it; give a folder that has one")
    if not path.is_file():
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(name, "transformer/config.json"))
        except (OSError, ValueError) as error:
            if name not in DEFAULTS:
                reason = " ".join(str(error).split())[:160]
                raise ValueError(
                    f"pipeline={name!r}: no such folder, and not to be had from the hub ({reason})"
                ) from None
            kind, settings = DEFAULTS[name]
            return lambda: getattr(diffusers, kind)(**settings)
    config = json.loads(path.read_text(encoding="utf-8"))
    kind = config.get("_class_name")
    if kind not in FAMILIES or not hasattr(diffusers, str(kind)):
        raise ValueError(f"pipeline={name!r}: its transformer is a {kind}; known: {', '.join(FAMILIES)}")
    return lambda: getattr(diffusers, kind).from_config(config)


def activations(
    mode: AbstractContextManager[Any], student: Any, grid: tuple[int, int], batch: int, text_tokens: int, count: int
) -> tuple[int, int]:
    """Bytes that autograd keeps of a forward of a student made in `mode`: of every block, and of their inputs alone."""
    kind, family = type(student).__name__, family_of(student)
    known = replace(family, grids=lambda model, call: (grid,), references=lambda model, call: 0)
    # Real, and from then on remembered: which tokens are carried cannot be told from fake ones.
    make_token_order((grid,), student.elastic_record.window, (count,), torch.device("cpu"))
    with mode, in_bfloat16(), registered(kind, known):
        call = CALLS[kind](student, grid, batch, text_tokens)

        def forward() -> Tensor:
            with budget(count, doubled=False):
                return output_tensor(student(**call)).float().square().mean()

        student.train()
        whole = saved_bytes(student, forward)
        student.enable_gradient_checkpointing()
        return whole, saved_bytes(student, forward)


@contextmanager
def in_bfloat16() -> Iterator[None]:
    """New tensors are bfloat16: what autocast makes of activations, and of weights for its matrix products."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _flux_call(model: Any, grid: tuple[int, int], batch: int, text: int) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": torch.zeros(batch, math.prod(grid), config.in_channels),
        "encoder_hidden_states": torch.zeros(batch, text, config.joint_attention_dim),
        "pooled_projections": torch.zeros(batch, config.pooled_projection_dim),
        "timestep": torch.zeros(batch),
        "guidance": torch.zeros(batch) if config.guidance_embeds else None,
        "img_ids": torch.zeros(math.prod(grid), 3),
        "txt_ids": torch.zeros(text, 3),
    }


def _qwen_call(model: Any, grid: tuple[int, int], batch: int, text: int) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": torch.zeros(batch, math.prod(grid), config.in_channels),
        "encoder_hidden_states": torch.zeros(batch, text, config.joint_attention_dim),
        "timestep": torch.zeros(batch),
        "img_shapes": [[(1, *grid)]] * batch,
    }


def _flux2_call(model: Any, grid: tuple[int, int], batch: int, text: int) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": torch.zeros(batch, math.prod(grid), config.in_channels),
        "encoder_hidden_states": torch.zeros(batch, text, config.joint_attention_dim),
        "timestep": torch.zeros(batch),
        "guidance": torch.zeros(batch),
        "img_ids": torch.zeros(batch, math.prod(grid), 4),
        "txt_ids": torch.zeros(batch, text, 4),
    }


def _chroma_call(model: Any, grid: tuple[int, int], batch: int, text: int) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": torch.zeros(batch, math.prod(grid), config.in_channels),
        "encoder_hidden_states": torch.zeros(batch, text, config.joint_attention_dim),
        "timestep": torch.zeros(batch),
        "img_ids": torch.zeros(math.prod(grid), 3),
        "txt_ids": torch.zeros(text, 3),
        "attention_mask": torch.ones(batch, text + math.prod(grid), dtype=torch.bool),
    }


def _z_call(model: Any, grid: tuple[int, int], batch: int, text: int) -> dict[str, Any]:
    rows, columns = grid
    return {
        "x": list(torch.zeros(batch, model.config.in_channels, 1, 2 * rows, 2 * columns)),
        "t": torch.zeros(batch),
        "cap_feats": list(torch.zeros(batch, text, model.config.cap_feat_dim)),
    }


CALLS: Mapping[str, Callable[[Any, tuple[int, int], int, int], dict[str, Any]]] = {
    "FluxTransformer2DModel": _flux_call,
    "Flux2Transformer2DModel": _flux2_call,
    "ChromaTransformer2DModel": _chroma_call,
    "ZImageTransformer2DModel": _z_call,
    "QwenImageTransformer2DModel": _qwen_call,
}
