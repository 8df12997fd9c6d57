"""Scores of a model along its dial: quality and cost at every budget, with and without guidance."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elit.evaluate.features import DigitClassifier
from elit.evaluate.metrics import frechet_distance
from elit.evaluate.statistics import Moments
from elit.flow.guidance import Guidance
from elit.models.dit import DiT
from elit.sampling import sample, sampling_flops


@dataclass(frozen=True, kw_only=True)
class Score:
    """One setting of the dial."""

    budget: float
    """Share of the latents."""
    tokens_per_group: int
    """J̃, latents kept of every group."""
    guidance: str
    """"none" or the kind of guidance."""
    gflops_per_image: float
    """All steps, guidance included."""
    ms_per_image: float
    """Wall-clock of the batch over its images."""
    fd: float
    """Fréchet distance to the real images on the classifier's features."""
    accuracy: float
    """Share of the samples that the classifier gives the class they were made for."""


def score_dial(
    model: DiT,
    classifier: DigitClassifier,
    real: Tensor,
    *,
    budgets: Sequence[int],
    guidance: Sequence[Guidance | None],
    count: int,
    steps: int,
    batch_size: int = 100,
    seed: int = 0,
    progress: Callable[[Score], None] | None = None,
) -> list[Score]:
    """Samples `count` images, classes in turn and the same noise every time, for each budget and guidance.

    real: (N, C, H, W) in [-1, 1]. Returns one score a pair, budgets outermost.
    """
    with torch.no_grad():
        reference = Moments(classifier.head.in_features).add(classifier(real)[0])
    labels = torch.arange(count) % model.config.num_classes
    sample(model, labels, steps=1, batch_size=batch_size)  # the first call on a machine is slower
    scores = []
    for kept in budgets:
        for chosen in guidance:
            start = time.perf_counter()
            images = sample(model, labels, steps=steps, budget=kept, guidance=chosen, seed=seed, batch_size=batch_size)
            if images.is_cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            with torch.no_grad():
                features, logits = classifier(images.clamp(-1, 1).cpu())
            moments = Moments(features.shape[1]).add(features)
            score = Score(
                budget=kept / model.budgets[-1],
                tokens_per_group=kept,
                guidance=chosen.kind if chosen else "none",
                gflops_per_image=sampling_flops(model, steps=steps, budget=kept, guidance=chosen) / 1e9,
                ms_per_image=1e3 * seconds / count,
                fd=frechet_distance(reference.mean, reference.covariance, moments.mean, moments.covariance),
                accuracy=(logits.argmax(1) == labels).double().mean().item(),
            )
            scores.append(score)
            if progress:
                progress(score)
    return scores
