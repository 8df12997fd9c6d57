"""What a run minimises. The loop knows no more of an objective than `Objective` says.

B samples of a step's whole batch, b of a process's micro-batch.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from elit.config import TrainConfig
from elit.data.latents import posterior_sample
from elit.flow.path import flow_matching_loss, interpolate, logit_normal

Draws = Sequence[Tensor]


class Objective(Protocol):
    """Both methods depend on nothing but what they are handed, so a resumed run repeats itself."""

    def draw(self, step: int) -> Draws:
        """What chance decides of a step, each (B, ...): a function of (seed, step), the same on every process."""
        ...

    def losses(
        self, model: nn.Module, batch: Any, draws: Sequence[Tensor], budget: int | None
    ) -> tuple[Tensor, Tensor]:
        """t (b,) and losses (b,) of a micro-batch; draws: its rows of `draw`."""
        ...


@dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """‖v − (X1 − X0)‖² at a time drawn for each sample (paper section 3), some labels left out."""

    config: TrainConfig
    shape: tuple[int, ...]
    """Of a sample, (C, ...)."""
    device: torch.device
    moments: bool
    """Batches hold the moments of latents, from which a sample is drawn."""
    drop_condition: Callable[[Any, Tensor], Any]
    """(y, dropped (b,) bool) -> y."""
    autocast: Callable[[], AbstractContextManager[Any]]
    """Around the network's forward."""

    def draw(self, step: int) -> Draws:
        posterior = (draw_posterior(self.config, step, self.shape, self.device),) if self.moments else ()
        return *draw_step(self.config, step, self.shape, self.device), *posterior

    def losses(
        self, model: nn.Module, batch: Any, draws: Sequence[Tensor], budget: int | None
    ) -> tuple[Tensor, Tensor]:
        images, y, noise, t, x = self.noised(batch, draws)
        with self.autocast():
            velocity = model(x, t, y, budget)
        return t, flow_matching_loss(velocity, noise, images)

    def noised(self, batch: Any, draws: Sequence[Tensor]) -> tuple[Tensor, Any, Tensor, Tensor, Tensor]:
        """X1, y with some conditions gone, X0, t and X_t of a micro-batch."""
        images, y = batch
        noise, t, dropped, *posterior = draws
        if posterior:
            images = posterior_sample(images, posterior[0])
        return images, self.drop_condition(y, dropped), noise, t, interpolate(noise, images, t)


def draw_step(
    config: TrainConfig, step: int, shape: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Noise (B, *shape), times (B,) and dropped labels (B,) bool of a step's whole batch, on every process alike.

    A function of (seed, step): a step is the same however many processes share it and wherever a run resumed.
    """
    seed = random.Random(f"step/{config.seed}/{step}").getrandbits(63)
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.randn(config.batch_size, *shape, generator=generator, device=device)
    normal = torch.randn(config.batch_size, generator=generator, device=device)
    dropped = torch.rand(config.batch_size, generator=generator, device=device) < config.class_dropout
    return noise, logit_normal(normal, config.time_shift), dropped


def draw_posterior(config: TrainConfig, step: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Noise (B, *shape) with which a step's latents are drawn from their posteriors; as `draw_step`, for all alike."""
    seed = random.Random(f"posterior/{config.seed}/{step}").getrandbits(63)
    return torch.randn(config.batch_size, *shape, generator=torch.Generator(device).manual_seed(seed), device=device)
