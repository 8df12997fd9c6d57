"""Scores of a network of the Fashion-MNIST studies: its loss on test pictures, and the quality of its samples.

Every score is written to SCORES as it is made, so that a killed study goes on where it stopped.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from elit.budgets import Schedule
from elit.data.builtin import fashion_mnist
from elit.data.images import ImageSet
from elit.evaluate.detectors import FashionDetector
from elit.evaluate.metrics import frechet_distance, moments
from elit.evaluate.reference import load_reference
from elit.flow.guidance import Guidance
from elit.flow.path import flow_matching_loss, interpolate, logit_normal
from elit.models.dit import DiT
from elit.sampling.evaluations import sampling_flops
from elit.sampling.sample import sample, seeded_noise

RESAMPLES = 20  # bootstrap draws behind the standard error of a Fréchet distance


@cache
def detector() -> FashionDetector:
    return FashionDetector()


@cache
def test_pictures() -> ImageSet:
    return fashion_mnist("test")


@cache
def reference() -> tuple[Tensor, Tensor]:
    """Mean and covariance of the detector's features over the 10,000 test pictures."""
    from elit.evaluate.reference import FASHION_REFERENCE

    tensors = load_reference(FASHION_REFERENCE, detector()).tensors
    return tensors["mean"], tensors["covariance"]


def distance(features: Tensor) -> float:
    return frechet_distance(*reference(), *moments([features]))


def score(images: Tensor, labels: Tensor) -> dict[str, float]:
    """FD to the test pictures, its standard error by the bootstrap, and accuracy by the classifier."""
    parts = [detector()(part.clamp(-1, 1)) for part in images.split(500)]
    features = torch.cat([part.features for part in parts])
    seen = torch.cat([cast(Tensor, part.label) for part in parts])
    generator = torch.Generator().manual_seed(0)
    count = len(features)
    again = [distance(features[torch.randint(count, (count,), generator=generator)]) for _ in range(RESAMPLES)]
    return {
        "FD": distance(features),
        "FD_error": torch.tensor(again).std().item(),
        "accuracy": (seen == labels).float().mean().item(),
    }


@torch.no_grad()
def held_out_loss(model: DiT, budget: int | None, *, count: int, draws: int = 2) -> float:
    """Flow-matching loss on the first `count` test pictures, `draws` noises and times each, the same for all networks.

    Times are evenly spread quantiles of the logit-normal, in random order: less noise than independent ones.
    """
    images, labels = test_pictures().__getitems__(list(range(count)))
    every, total = draws * count, 0.0
    quantiles = (torch.randperm(every, generator=torch.Generator().manual_seed(1)) + 0.5) / every
    for draw, t in enumerate(logit_normal(torch.special.ndtri(quantiles)).split(count)):
        noise = seeded_noise(range(10**6 * (draw + 1), 10**6 * (draw + 1) + count), images.shape[1:])
        x = interpolate(noise, images, t)
        for rows in torch.arange(count).split(250):
            velocity = model(x[rows], t[rows], labels[rows], budget)
            total += flow_matching_loss(velocity, noise[rows], images[rows]).sum().item()
    return total / every


@dataclass(frozen=True)
class Scores:
    """Scores by what they are of, kept in a file of JSON lines."""

    path: Path

    def get(self, key: dict[str, Any], make: Any) -> dict[str, float]:
        """The scores of `key`, made by make() where they are not there yet."""
        words = json.dumps(key, sort_keys=True)
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        for line in lines:
            row = json.loads(line)
            if json.dumps(row["key"], sort_keys=True) == words:
                return row["scores"]
        scores = make()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "scores": scores}) + "\n")
        return scores


def draw_and_score(
    model: DiT,
    *,
    count: int,
    steps: int,
    budget: Schedule = None,
    guidance: Guidance | None = None,
    cache: float = 0.0,
) -> dict[str, float]:
    """`count` samples, classes in turn and the same noise for all networks, scored; with the GFLOPs of one.

    Compiled, since thousands are drawn: a network that is given other weights need not be compiled again.
    """
    labels = torch.arange(count) % 10
    settings: dict[str, Any] = {"steps": steps, "budget": budget, "guidance": guidance, "cache": cache}
    images = sample(model, labels, seed=5000, batch_size=50, dtype=torch.bfloat16, compile=True, **settings)
    return score(images, labels) | {"GFLOPs": sampling_flops(model, **settings) / 1e9}
