"""The seam between the loop and those who have something to train, and a flow's objective; B samples a step."""

import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from elit.config import RunConfig, TrainConfig
from elit.data.images import posterior_sample
from elit.data.loader import Batch, StepSampler
from elit.flow.path import flow_matching_loss, interpolate, logit_normal
from elit.models.conditioning import Condition
from elit.training.checkpoint import AveragedWeights
from elit.training.logger import RunLog

Draws = Sequence[Tensor]


class Task(Protocol):
    """A network, its data and what a run leaves: all that `training/loop.py` does not know."""

    config: RunConfig  # complete: what the data decides is filled in
    network: nn.Module  # holds what is trained, the parameters that require a gradient
    blocks: Iterable[nn.Module]  # its blocks, which are compiled, sharded and checkpointed one by one
    budgets: Sequence[int]  # the budgets of which one is drawn for a step; none for a baseline
    flops: dict[int | None, int]  # FLOPs of a sample's training step, by budget
    examples: Any  # a data set whose `__getitems__` gives (samples, conditions), both with `.to`
    sampler: StepSampler
    identity: dict[str, object] = {}  # noqa: RUF012
    """Classes, count and a stamp of the data's files, as JSON, compared when a run resumes."""

    def initialize(self, *, resumed: bool) -> list[str]:
        """Once the folder is claimed: may set `flops`, `examples`, `sampler` and first weights; lines to print."""

    def objective(self, accelerator: Accelerator) -> Any:
        """`draw(step)`: tensors (B, ...) by chance; `losses(model, batch, draws, budget)`: t (b,) and losses (b,)."""

    def preview(self, accelerator: Accelerator, average: AveragedWeights, log: RunLog, step: int) -> None:
        """Writes a picture of what the averaged weights do."""

    def score(self, average: AveragedWeights, log: RunLog, step: int) -> None:
        """Scores the averaged weights where it is time to; all processes call it after every step."""
        return

    def finish(self, accelerator: Accelerator, averages: Sequence[AveragedWeights]) -> Any:
        """Saves what the run leaves, and returns what it gives back."""


@dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """‖v − (X1 − X0)‖² at a time drawn for each sample (paper section 3), some labels left out."""

    config: TrainConfig
    shape: tuple[int, ...]  # (C, ...) of a sample
    device: torch.device
    moments: bool  # batches hold the moments of latents, from which a sample is drawn
    drop_condition: Callable[[Condition, Tensor], Condition]  # (y, dropped (b,) bool) -> y
    autocast: Callable[[], AbstractContextManager[None]]  # around the network's forward

    def draw(self, step: int) -> Draws:
        """Noise (B, *shape), times (B,), dropped labels (B,) bool; noise of moments' samples, or the mirrored (B,)."""
        config, size = self.config, (self.config.batch_size,)
        generator = self._generator("step", step)
        noise = torch.randn(*size, *self.shape, generator=generator, device=self.device)
        normal = torch.randn(size, generator=generator, device=self.device)
        dropped = torch.rand(size, generator=generator, device=self.device) < config.class_dropout
        draws = (noise, logit_normal(normal, config.time_shift), dropped)
        if config.horizontal_flip:
            return *draws, torch.rand(size, generator=self._generator("flip", step), device=self.device) < 0.5
        if not self.moments:
            return draws
        posterior = self._generator("posterior", step)
        return *draws, torch.randn(*size, *self.shape, generator=posterior, device=self.device)

    def losses(self, model: nn.Module, batch: Batch, draws: Draws, budget: int | None) -> tuple[Tensor, Tensor]:
        images, y, noise, t, x = self.noised(batch, draws)
        with self.autocast():
            velocity = model(x, t, y, budget)
        return t, flow_matching_loss(velocity, noise, images)

    def noised(self, batch: Batch, draws: Draws) -> tuple[Tensor, Condition, Tensor, Tensor, Tensor]:
        """X1, y with some conditions gone, X0, t and X_t of a micro-batch."""
        images, y = batch
        noise, t, dropped, *more = draws
        if self.config.horizontal_flip:
            images = images.where(~more[0].view(-1, *[1] * (images.ndim - 1)), images.flip(-1))
        elif more:
            images = posterior_sample(images, more[0])
        return images, self.drop_condition(y, dropped), noise, t, interpolate(noise, images, t)

    def _generator(self, purpose: str, step: int) -> torch.Generator:
        seed = random.Random(f"{purpose}/{self.config.seed}/{step}").getrandbits(63)
        return torch.Generator(self.device).manual_seed(seed)
