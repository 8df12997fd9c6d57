"""The losses of a distillation: the distance to recorded calls, or to pictures and to the original."""

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elit.config import DistillConfig
from elit.data.images import posterior_sample
from elit.data.loader import BucketSampler
from elit.elastic.captioned_images import CaptionedImages
from elit.elastic.context import budget, original
from elit.elastic.families.family import Family, Pipeline
from elit.elastic.recording import TIMES, CallBatch, output_tensor
from elit.elastic.trees import Arguments
from elit.flow.path import interpolate, logit_normal
from elit.training.task import Draws

Autocast = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, kw_only=True)
class DistanceToTeacher:
    """‖v − v_teacher‖² on recorded calls of the original, whatever v is to its class."""

    noise: Callable[[Arguments], Tensor]
    """A call's noise level, 1 = noise."""
    autocast: Autocast

    def draw(self, step: int) -> Draws:
        return ()

    def losses(self, model: nn.Module, batch: Any, draws: Draws, budget_: int | None) -> tuple[Tensor, Tensor]:
        teacher, call = batch
        with budget(budget_, doubled=False), self.autocast():
            output = output_tensor(model(**call.arguments))
        t = (1 - self.noise(call.arguments).float()).expand(len(teacher)).clamp(0, 1)
        return t, mean_square(output.float() - teacher.float())


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The target of a class of transformers for a noisy sample, made of latents and noise.

    A flow's class predicts dx/dt in its own time: noise − data where its time grows towards noise, data − noise else
    (Z-Image, Lumina 2). Others predict the scheduler's `prediction_type`, at DDPM's steps.
    """

    family: Family
    alphas: Tensor | None
    """ᾱ of DDPM's steps; None for a flow."""
    kind: str
    """flow, epsilon, v_prediction or sample."""

    @classmethod
    def of(cls, pipe: Pipeline, family: Family) -> "Prediction":
        """Reads the pipeline's scheduler. Raises ValueError where it does not say."""
        scheduler = pipe.scheduler
        name, kind = type(scheduler).__name__, scheduler.config.get("prediction_type", "epsilon")
        if name.startswith("FlowMatch") or kind == "flow_prediction":
            return cls(family=family, alphas=None, kind="flow")
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if alphas is None or kind not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(
                f"data: not supported for a {name} with prediction_type={kind!r}; distil this pipeline with prompts"
            )
        return cls(family=family, alphas=torch.as_tensor(alphas, dtype=torch.float32), kind=kind)

    def call(self, x: Tensor, noise: Tensor, t: Tensor, call: CallBatch) -> tuple[Arguments, Tensor]:
        """Arguments of a forward at time t (B,), 0 = noise, 1 = data, and its target; x, noise: packed, (B, ...)."""
        arguments, sample = dict(call.arguments), self.family.sample
        name = next(name for name in TIMES if name in arguments)
        low, high = (
            float(self.family.noise({**arguments, name: torch.tensor(value)}).flatten()[0]) for value in (0.0, 1.0)
        )
        if self.alphas is None:
            noisy, target = interpolate(noise, x, t), noise - x if high > low else x - noise
            time = (1 - t - low) / (high - low)
        else:
            time = ((1 - t) * len(self.alphas)).long().clamp(max=len(self.alphas) - 1)
            alpha = self.alphas.to(x.device)[time].view(-1, *[1] * (x.ndim - 1))
            noisy = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
            velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * x
            target = {"epsilon": noise, "v_prediction": velocity, "sample": x}[self.kind]
        arguments[name] = time.to(arguments[name].dtype)
        arguments[sample] = list(noisy.unbind()) if self.family.listed else noisy
        return arguments, target


@dataclass(frozen=True, kw_only=True)
class PicturesAndTeacher:
    """The loss of the class's own training on pictures + `weight` · ‖v − v_teacher‖², the teacher at all tokens.

    Where guidance was distilled into a network (Flux), pictures do not say what it predicts: the distance alone.
    """

    config: DistillConfig
    examples: CaptionedImages
    sampler: BucketSampler
    prediction: Prediction
    teacher: nn.Module
    device: torch.device
    autocast: Autocast

    def draw(self, step: int) -> Draws:
        """Noise (B, C, ...), times (B,) and noise of the posteriors (B, C, ...)."""
        seed = random.Random(f"distill/{self.config.seed}/{step}").getrandbits(63)
        generator = torch.Generator(self.device).manual_seed(seed)
        shape = (self.config.batch_size, *self.examples.shape(self.sampler.samples(step)[0]))
        noise, posterior = (torch.randn(shape, generator=generator, device=self.device) for _ in range(2))
        if self.prediction.alphas is not None:
            return noise, torch.rand(shape[:1], generator=generator, device=self.device), posterior
        normal = torch.randn(shape[:1], generator=generator, device=self.device)
        return noise, logit_normal(normal, self.config.time_shift), posterior

    def losses(self, model: nn.Module, batch: Any, draws: Draws, budget_: int | None) -> tuple[Tensor, Tensor]:
        arguments, target = self.call(batch, draws)
        wanted = self.wanted(arguments)
        with self.autocast(), budget(budget_, doubled=False):
            output = output_tensor(model(**arguments)).float()
        losses = self.config.distillation * mean_square(output - wanted)
        if not isinstance(arguments.get("guidance"), Tensor):
            predicted = output[:, : target.shape[1]]  # DiT and PixArt have variances behind it
            losses = losses + mean_square(predicted - target.float())
        return draws[1], losses

    def wanted(self, arguments: Arguments) -> Tensor:
        """The original's prediction."""
        with torch.no_grad(), original(), self.autocast():
            return output_tensor(self.teacher(**arguments)).float()

    def call(self, batch: Any, draws: Draws) -> tuple[Arguments, Tensor]:
        """Arguments of a forward, and its target in the class's own training."""
        moments, call = batch
        noise, t, posterior = draws
        pack = self.prediction.family.pack
        assert pack is not None
        return self.prediction.call(pack(posterior_sample(moments, posterior)), pack(noise), t, call)


def mean_square(difference: Tensor) -> Tensor:
    """The mean of each sample (B,)."""
    return difference.square().flatten(1).mean(1)
