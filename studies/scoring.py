"""Scores of an arm: its loss on held-out digits, and the quality of its samples."""

import argparse
from functools import cache
from typing import Any, cast

import torch
from arms import data
from torch import Tensor

from elit.budgets import Schedule
from elit.data.builtin import digits
from elit.evaluate.detectors import ImageDetector, train_digit_classifier
from elit.evaluate.metrics import frechet_distance, moments
from elit.flow.guidance import Guidance
from elit.flow.path import flow_matching_loss, interpolate, logit_normal
from elit.models.dit import DiT
from elit.sampling.evaluations import sampling_flops
from elit.sampling.sample import sample, seeded_noise


@cache
def detector() -> ImageDetector:
    """The digit classifier, the same in all studies."""
    return ImageDetector(train_digit_classifier(digits(), seed=0).model)


@torch.no_grad()
def held_out_loss(args: argparse.Namespace, model: DiT, budget: int | None = None, draws: int = 4) -> float:
    """Flow-matching loss on the digits not trained on, `draws` noises and times an image, the same for all networks.

    Times are evenly spread quantiles of the logit-normal, in random order: less noise than independent ones.
    """
    images, labels = data()[1].images[: args.samples], data()[1].labels[: args.samples]
    count, total = draws * len(images), 0.0
    quantiles = (torch.randperm(count, generator=torch.Generator().manual_seed(1)) + 0.5) / count
    times = logit_normal(torch.special.ndtri(quantiles)).split(len(images))
    for draw, t in enumerate(times):
        noise = seeded_noise(range(10**6 * (draw + 1), 10**6 * (draw + 1) + len(images)), images.shape[1:])
        x = interpolate(noise, images, t).to(model.device)
        velocity = model(x, t.to(model.device), labels.to(model.device), budget).cpu()
        total += flow_matching_loss(velocity, noise, images).mean().item() / draws
    return total


def draw(
    model: DiT, count: int, *, steps: int, budget: Schedule = None, guidance: Guidance | None = None
) -> tuple[Tensor, Tensor]:
    """`count` digits, classes in turn, as they leave the solver, and their labels; the same noise for all networks."""
    labels = torch.arange(count) % 10
    settings: dict[str, Any] = {"steps": steps, "budget": budget, "guidance": guidance}
    settings |= {"sample_size": 8, "seed": 5000, "batch_size": 250}
    return sample(model, labels, **settings).cpu(), labels


def score(images: Tensor, labels: Tensor) -> dict[str, float]:
    """Fréchet distance ("FD") to all real digits on the classifier's features, and "accuracy"."""
    find = detector()
    detection = find(images.clamp(-1, 1))
    distance = frechet_distance(*moments([find(digits().images).features]), *moments([detection.features]))
    return {"FD": distance, "accuracy": torch.eq(cast(Tensor, detection.label), labels).float().mean().item()}


def sampling_gflops(model: DiT, **settings: Any) -> float:
    """GFLOPs of one whole sample."""
    return sampling_flops(model, **settings) / 1e9
