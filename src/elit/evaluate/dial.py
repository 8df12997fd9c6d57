"""Scores of a model along its dial: quality and cost at every budget, with and without guidance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elit.costs.timing import timed
from elit.evaluate.detectors import Detector
from elit.evaluate.metrics import Moments, frechet_distance
from elit.flow.guidance import Guidance
from elit.models.conditioning import Condition
from elit.models.transformer import Transformer
from elit.sampling.evaluations import sampling_flops
from elit.sampling.sample import sample
from elit.sampling.settings import Sampling


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
    """Wall-clock of the fastest batch over its images."""
    fd: float
    """Fréchet distance to the real samples on the detector's features."""
    accuracy: float
    """Share of the samples that the detector recognises as the class they were made for."""
    steady: float | None = None
    """Clips: share of them in which every frame shows the same class."""


def headings(scores: Sequence[Score]) -> tuple[str, ...]:
    """The columns of `score_cells`."""
    kind = "image" if scores[0].steady is None else "clip"
    columns = ("budget", "latents", "guidance", f"GFLOPs/{kind}", f"ms/{kind}", "FD", "accuracy")
    return columns if kind == "image" else (*columns, "steady")


def score_cells(score: Score) -> tuple[str, ...]:
    """The columns of `headings` as text."""
    return (
        f"{score.budget:.4g}",
        str(score.tokens_per_group),
        score.guidance.upper() if score.guidance != "none" else "none",
        f"{score.gflops_per_image:.3f}",
        f"{score.ms_per_image:.2f}",
        f"{score.fd:.1f}",
        f"{score.accuracy:.3f}",
        *([] if score.steady is None else [f"{score.steady:.3f}"]),
    )


def score_dial(
    model: Transformer,
    detector: Detector,
    real: Tensor,
    *,
    conditions: Condition,
    budgets: Sequence[int],
    guidance: Sequence[Guidance | None],
    count: int,
    steps: int,
    batch_size: int = 50,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Samples `count` times, classes in turn and the same noise every time, for each budget and guidance.

    real: (N, C, ...) in [-1, 1]. conditions: y of every class, in their order. progress: called with (batches done,
    batches in all). Returns one score a pair, budgets outermost. Every batch goes through all settings before the next
    one, and a setting's time is that of its fastest batch, so that the machine's other work slows all of them alike.
    """
    reference = Moments(detector.width).add(detector(real).features)
    labels = torch.arange(count) % len(conditions)
    settings = [Sampling(steps=steps, budget=budget, guidance=each) for budget in budgets for each in guidance]
    moments = [Moments(detector.width) for _ in settings]
    correct, steady, fastest = ([start] * len(settings) for start in (0, 0, float("inf")))
    sample(model, conditions[labels[:batch_size]], steps=1)  # the first call on a machine is slower

    batches = list(labels.split(batch_size))
    for done, part in enumerate(batches):
        for i, sampling in enumerate(settings):
            seeded = replace(sampling, seed=seed + done * batch_size)
            images, seconds = timed(lambda: sample(model, conditions[part], seeded), model.device)  # noqa: B023
            fastest[i] = min(fastest[i], seconds / len(part))
            detection = detector(images.clamp(-1, 1).cpu())
            moments[i].add(detection.features)
            correct[i] += int((detection.label == part).sum())
            steady[i] += 0 if detection.steady is None else int(detection.steady.sum())
        if progress:
            progress(done + 1, len(batches))
    return [
        Score(
            budget=budget / model.budgets[-1],
            tokens_per_group=budget,
            guidance=sampling.guidance.kind if sampling.guidance else "none",
            gflops_per_image=sampling_flops(model, sampling) / 1e9,
            ms_per_image=1e3 * fastest[i],
            fd=frechet_distance(reference.mean, reference.covariance, moments[i].mean, moments[i].covariance),
            accuracy=correct[i] / count,
            steady=steady[i] / count if detection.steady is not None else None,
        )
        for i, (budget, sampling) in enumerate(
            zip((budget for budget in budgets for _ in guidance), settings, strict=True)
        )
    ]
