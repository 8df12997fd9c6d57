"""Distillation of this library's own DiT, on the data it was trained on: what `elit elastify` does."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from elit.config import DistillConfig, TrainConfig
from elit.data.images import ImageData
from elit.data.latents import LatentSet
from elit.elastic.cost import count_block_flops
from elit.elastic.distill import student_budgets
from elit.elastic.families import all_blocks
from elit.elastic.runtime import original
from elit.flow.path import flow_matching_loss
from elit.training.ema import AveragedWeights
from elit.training.logger import RunLog
from elit.training.loop import train_task
from elit.training.objectives import Draws, FlowMatching
from elit.training.task import Task, step_sampler


def distill_network(network: nn.Module, data: ImageData, config: DistillConfig) -> Any:
    """Trains a DiT that `prepare_student` had on `data`, in the folder `config.out`; returns it, in evaluation mode.

    Resumes, stops and raises as `train_task`; ValueError too for a network of another kind or shape than the data.
    """
    return train_task(config, lambda accelerator: DistillNetwork(config, accelerator, network, data))


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
    network: Any

    def __init__(self, config: DistillConfig, accelerator: Accelerator, network: Any, data: ImageData):
        record = getattr(network, "elastic_record", None)
        if record is None or record.kind != "DiT":
            raise ValueError(f"student: a {type(network).__name__}; give a DiT of this library that elastify had")
        shape = (network.config.in_channels, *network.sample_size)
        if tuple(data.shape) != shape:
            raise ValueError(f"data: samples of shape {tuple(data.shape)}, the network's are {shape}")
        self.config, self.network, self.examples = config, network, data
        # Where all weights move, the teacher must be another network.
        self.teacher = copy.deepcopy(network).eval().to(accelerator.device) if config.weights == "all" else network
        self.blocks = all_blocks(network)
        self.budgets = student_budgets(network, config)
        tokens = (network.token_grid(network.sample_size),)
        # The original's forward too, and no gradients of weights that stay.
        passes = 3 if config.weights == "all" else 2
        self.flops = {
            count: count_block_flops(network, tokens=tokens, interface=False)
            + passes * count_block_flops(network, tokens=tokens, budget=count)
            for count in network.budgets
        }
        self.sampler = step_sampler(config, accelerator, len(data))

    def initialize(self, *, resumed: bool) -> list[str]:
        return []

    def objective(self, accelerator: Accelerator) -> FlowAndDistance:
        config = self.config
        return FlowAndDistance(
            config=TrainConfig(seed=config.seed, batch_size=config.batch_size, class_dropout=config.prompt_dropout),
            shape=tuple(self.examples.shape),
            device=accelerator.device,
            moments=isinstance(self.examples, LatentSet),
            drop_condition=self.network.without_condition,
            autocast=accelerator.autocast,
            teacher=self.teacher,
            weight=config.distillation,
        )

    def preview(self, accelerator: Accelerator, average: AveragedWeights, log: RunLog, step: int) -> None:
        """None: the command measures before and after."""

    def finish(self, accelerator: Accelerator, average: AveragedWeights) -> Any:
        network = accelerator.unwrap_model(self.network, keep_fp32_wrapper=False)
        network.load_state_dict(average.whole(), strict=False)
        return network.requires_grad_().eval()
