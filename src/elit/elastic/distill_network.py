"""Distillation of this library's own DiT, on the data it was trained on."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from elit.budgets import training_budgets
from elit.config import DistillConfig, TrainConfig
from elit.data.images import LatentSet
from elit.data.loader import StepSampler
from elit.elastic.context import original
from elit.elastic.cost import step_flops
from elit.elastic.families import all_blocks
from elit.elastic.families.family import Model
from elit.elastic.low_rank import add_low_rank
from elit.elastic.surgery import elastify
from elit.flow.path import flow_matching_loss, interpolate
from elit.models.saved import load_own, save_model
from elit.training.checkpoint import AveragedWeights
from elit.training.logger import RunLog
from elit.training.task import Draws, FlowMatching, Task
from elit.training.train import load_data


def prepare_student(network: Model, config: DistillConfig) -> None:
    """Adds interface and low-rank changes to a transformer, and lets gradients reach what is trained."""
    names = ("read_after", "write_after", "window", "mode", "seed")
    elastify(network, **{name: getattr(config, name) for name in names})
    if config.weights == "lora":
        add_low_rank(network, config.lora_rank, seed=config.seed)
    for module in network.modules():  # the teacher drops nothing, and a resumed run repeats itself
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "dropout_prob"):  # DiT's labels
            module.dropout_prob = 0.0
    network.requires_grad_(config.weights == "all")
    network.elastic.requires_grad_()
    network.elastic_record = replace(
        network.elastic_record,
        lora_rank=config.lora_rank if config.weights == "lora" else 0,
        original_at_full=config.weights != "all",
        base=config.pipeline,
    )


def student_budgets(network: Model, config: DistillConfig) -> tuple[int, ...]:
    """The budgets that steps draw from. Raises ValueError for full budget where the original runs there."""
    full = network.budgets[-1]
    highest = full - network.elastic_record.original_at_full if config.budget_max is None else config.budget_max
    if network.elastic_record.original_at_full and highest >= full:
        raise ValueError(f"budget_max must be at most {full - 1}, got {highest}: at full budget the original runs")
    return training_budgets(network.budgets, config.budget_min, highest)


ROWS = 64
"""Samples of a validation."""


def validated_budgets(budgets: Sequence[int]) -> list[int]:
    """All, a half, a quarter and an eighth of a window's tokens."""
    return list(dict.fromkeys(max(1, round(budgets[-1] * share)) for share in (1.0, 0.5, 0.25, 0.125)))


@dataclass(frozen=True, kw_only=True)
class FlowAndDistance(FlowMatching):
    """‖v − (X1 − X0)‖² + `weight` · ‖v − v_teacher‖², the teacher at all tokens."""

    teacher: Callable[..., Tensor]
    weight: float

    def losses(self, model: nn.Module, batch: Any, draws: Draws, budget: int | None) -> tuple[Tensor, Tensor]:
        images, y, noise, t, x = self.noised(batch, draws)
        with self.autocast():
            with torch.no_grad(), original():
                wanted = self.teacher(x, t, y)
            velocity = model(x, t, y, budget)
        distance = (velocity.float() - wanted.float()).square().flatten(1).mean(1)
        return t, flow_matching_loss(velocity, noise, images) + self.weight * distance


class DistillNetwork(Task):
    """A DiT of this library."""

    config: DistillConfig
    network: Model

    def __init__(self, config: DistillConfig, accelerator: Accelerator):
        self.config, self.device = config, accelerator.device
        if config.data is None:
            raise ValueError("data must be given for a network of this library: digits, or whatever it was trained on")
        self.network = network = load_own(config.pipeline, torch_dtype=torch.float32)
        self.examples = load_data(TrainConfig(data=config.data, image_size=network.sample_size[-1]))
        shape = (network.config.in_channels, *network.sample_size)
        if tuple(self.examples.shape) != shape:
            raise ValueError(f"data must have samples of shape {shape}, got {tuple(self.examples.shape)}")
        prepare_student(network, config)
        # If all weights move, the teacher must be another network.
        self.teacher = copy.deepcopy(network).eval().to(self.device) if config.weights == "all" else network
        self.blocks = all_blocks(network)
        self.budgets = student_budgets(network, config)
        tokens = (network.token_grid(network.sample_size),)
        self.flops = step_flops(network, config, tokens, 0, teacher=True)
        rank, world = accelerator.process_index, accelerator.num_processes
        self.sampler = StepSampler(len(self.examples), config, rank=rank, world=world)

    def initialize(self, *, resumed: bool) -> list[str]:
        self.before = self.distances(self.network.to(self.device).eval())
        return []

    def objective(self, accelerator: Accelerator) -> FlowAndDistance:
        config = self.config
        return FlowAndDistance(
            config=TrainConfig(seed=config.seed, batch_size=config.batch_size, class_dropout=config.prompt_dropout),
            shape=tuple(self.examples.shape),
            device=accelerator.device,
            moments=isinstance(self.examples, LatentSet),
            drop_condition=self.network.conditioning.without,
            autocast=accelerator.autocast,
            teacher=self.teacher,
            weight=config.distillation,
        )

    def preview(self, accelerator: Accelerator, average: AveragedWeights, log: RunLog, step: int) -> None:
        """None: what it learned is measured before and after."""

    def distances(self, network: Model) -> dict[int, float]:
        """Root mean squared distance of the velocity to the original's on fixed samples, by budget."""
        generator = torch.Generator().manual_seed(self.config.seed)
        images, y = self.examples.__getitems__([i * len(self.examples) // ROWS for i in range(ROWS)])
        images = images[:, 0] if isinstance(self.examples, LatentSet) else images  # the mean
        t = torch.linspace(0.02, 0.98, ROWS)
        x = interpolate(torch.randn(images.shape, generator=generator), images, t)
        x, t, y = (part.to(self.device) for part in (x, t, y))
        with torch.no_grad():
            with original():
                wanted = self.teacher(x, t, y)
            counts = validated_budgets(network.budgets)
            return {count: (network(x, t, y, count) - wanted).square().mean().sqrt().item() for count in counts}

    def finish(self, accelerator: Accelerator, average: AveragedWeights) -> dict[str, Any]:
        network = accelerator.unwrap_model(self.network, keep_fp32_wrapper=False)
        network.load_state_dict(average.whole(), strict=False)
        network.requires_grad_().eval()
        after = self.distances(network)
        if accelerator.is_main_process:
            save_model(network, Path(self.config.out) / "model")
        full = network.budgets[-1]
        table = [
            {"tokens": count, "share": count / full, "distance_before": self.before[count], "distance": distance}
            for count, distance in after.items()
        ]
        return {"out": self.config.out, "model": str(Path(self.config.out) / "model"), "validation": table}
