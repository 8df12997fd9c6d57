"""Fits an elastified network to its frozen original: rectified flow plus distillation, over all budgets at once."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F

from elit.budgets import draw_budget
from elit.config import TrainConfig
from elit.data.images import ImageData
from elit.data.latents import LatentSet, posterior_sample
from elit.data.loader import Feed
from elit.data.sampler import StepSampler
from elit.elastic.lora import Adapters, check_adapters
from elit.elastic.runtime import original
from elit.flow.path import flow_matching_loss, interpolate
from elit.training.loop import draw_posterior, draw_step

WEIGHTS = ("all", "lora", "interface")


def distill(
    student: Any,
    data: ImageData,
    *,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    weights: str = "all",
    lora_rank: int = 16,
    distillation: float = 20.0,
    class_dropout: float = 0.1,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Any:
    """Trains `student`, an elastified DiT of this library, in place; returns it, in evaluation mode.

    Loss: ‖v − (X1 − X0)‖² + `distillation` · ‖v − v_teacher‖², means over all entries. The teacher is the original as
    it is now, at all tokens. A step draws one budget, uniform over all of them. The learning rate falls linearly to
    zero, so the last weights need no averaging.
    weights: "interface", "lora" for low-rank adapters of `lora_rank` on the blocks as well (they are in the weights
    when this returns), or "all". The teacher is the student's own blocks; beside "all", a frozen copy.

    Raises ValueError for a network that is not elastified or of another shape than the data, and without peft.
    """
    record = getattr(student, "elastic_record", None)
    if record is None or record.kind != "DiT":
        raise ValueError(f"student: a {type(student).__name__}; give a DiT of this library that elastify had")
    check_settings(weights, lora_rank)
    shape = (student.config.in_channels, *student.sample_size)
    if tuple(data.shape) != shape:
        raise ValueError(f"data: samples of shape {tuple(data.shape)}, the network's are {shape}")
    adapters = Adapters(student, rank=lora_rank, seed=seed) if weights == "lora" else None
    teacher = copy.deepcopy(student).eval() if weights == "all" else student
    alone: Callable[[], AbstractContextManager[None]] = adapters.off if adapters else original
    trained = list((student if weights == "all" else student.elastic).parameters())
    trained += adapters.parameters() if adapters else []
    device = student.device
    config = TrainConfig(
        steps=steps, batch_size=batch_size, learning_rate=learning_rate, class_dropout=class_dropout, seed=seed
    )
    sampler = StepSampler(len(data), seed=seed, batch_size=batch_size, parts=1, rank=0, world=1, stop=steps)
    feed = Feed(data, sampler, workers=0, device=device, say=say)
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    student.train()
    for step in range(steps):
        images, y = next(feed)
        noise, t, dropped = draw_step(config, step, data.shape, device)
        if isinstance(data, LatentSet):
            images = posterior_sample(images, draw_posterior(config, step, data.shape, device))
        x, y = interpolate(noise, images, t), student.without_condition(y, dropped)
        with torch.no_grad(), alone():
            wanted = teacher(x, t, y)
        velocity = student(x, t, y, draw_budget(seed, step, student.budgets))
        flow = flow_matching_loss(velocity, noise, images).mean()
        matched = F.mse_loss(velocity, wanted)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 50) * (1 - step / steps)
        optimizer.zero_grad()
        torch.autograd.backward(flow + distillation * matched, inputs=trained)
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        if (step + 1) % 200 == 0 or step + 1 == steps:
            say(f"step {step + 1:,} of {steps:,}: flow {flow.item():.4f}, distillation {matched.item():.5f}")
    if adapters:
        adapters.merge()
    return student.eval()


def check_settings(weights: str, lora_rank: int) -> None:
    """Raises ValueError for what `distill` cannot train."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r}: give {', '.join(WEIGHTS)}")
    if weights == "lora":
        check_adapters(lora_rank)
