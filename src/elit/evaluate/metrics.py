"""Metrics from features, in float64: N real samples, M generated ones, F features, K classes."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elit.files import Json

if TYPE_CHECKING:
    from elit.evaluate.chunks import Chunks

BLOCK = 1024  # rows of a distance matrix held at a time
FEATURES_KEPT = 50_000  # for KID, precision and recall; means and covariances are of all pictures
NEIGHBOURS = 3


def moments(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean (F,) and unbiased covariance (F, F) of features in parts (B, F), in float64."""
    count, total, outer = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for part in parts:
        x = part.detach().to("cpu", torch.float64)
        count, total, outer = count + len(x), total + x.sum(0), outer + x.T @ x
    mean = total / count
    return mean, (outer - torch.outer(total, mean)) / (count - 1)


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """|μ1 − μ2|² + tr(Σ1 + Σ2 − 2·(Σ1·Σ2)^½), by eigenvalues of the symmetric Σ1^½·Σ2·Σ1^½: Σ may be singular."""
    mean1, cov1, mean2, cov2 = (value.double() for value in (mean1, cov1, mean2, cov2))
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross)


def kernel_distance(
    real: Tensor, generated: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID (Bińkowski et al. 2018), unbiased, kernel (a·b/F + 1)³: mean and deviation over random subsets."""
    size = min(subset_size, len(real), len(generated))
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(subsets):
        x, y = (each[torch.randperm(len(each), generator=generator)[:size]].double() for each in (real, generated))
        xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        distances.append(within - 2 * xy.mean())
    values = torch.stack(distances)
    return float(values.mean()), float(values.std(correction=0))


def inception_score(logits: Tensor, *, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """exp E KL(p(k|x) ‖ p(k)) (Salimans et al. 2016): mean and deviation over equal parts of shuffled (M, K)."""
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    scores = []
    for part in logits[order].double().chunk(splits):
        log_p = part.log_softmax(1)
        p = log_p.exp()
        # xlogy: 0·log 0 = 0, where a class has no probability at all.
        divergence = (p * log_p).sum(1).mean() - torch.special.xlogy(p.mean(0), p.mean(0)).sum()
        scores.append(divergence.exp())
    values = torch.stack(scores)
    return float(values.mean()), float(values.std(correction=0))


def manifold_share(samples: Tensor, others: Tensor, *, neighbours: int = NEIGHBOURS) -> float:
    """Share of `samples` within a k-th neighbour's distance of one of `others` (Kynkäänniemi et al. 2019)."""
    if len(others) <= neighbours:
        raise ValueError(f"cannot find {neighbours} neighbours among {len(others)} samples: give more")
    centre = others.double().mean(0)  # close to the origin, squares lose fewer digits
    samples, others = samples.double() - centre, others.double() - centre
    # Squared distances to the k-th nearest other sample; the nearest of all is the sample itself, at 0.
    radii = [_squared(part, others).kthvalue(neighbours + 1, dim=1).values for part in others.split(BLOCK)]
    radius = torch.cat(radii)
    inside = torch.cat([(_squared(part, others) <= radius).any(1) for part in samples.split(BLOCK)])
    return float(inside.double().mean())


def saturation(pictures: Tensor) -> Tensor:
    """Vividness (paper Figure 15), (B,) in [0, 1] from uint8: HSV's saturation, or the contrast of grey pictures."""
    x = pictures.double().flatten(2)  # (B, C, pixels)
    if x.shape[1] == 1:
        return (x - x.mean(2, keepdim=True)).abs().mean((1, 2)) / 127.5
    most, least = x.amax(1), x.amin(1)
    return ((most - least) / most.clamp(min=1)).mean(1)


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances (A, B); what is rounding alone is 0, so duplicates are at 0."""
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    squares = norms - 2 * a @ b.T
    return torch.where(squares < 1e-13 * norms, 0.0, squares)


@dataclass(frozen=True)
class Metric:
    compute: Callable[["Chunks", Mapping[str, Tensor], Tensor], float | tuple[float, float]]
    """Takes detected features, the reference's tensors and the labels; gives a value, or one with its spread."""
    needs: str = ""  # A tensor of the reference, or "labels"
    lower: bool = False  # lower is better
    options: Json = field(default_factory=dict)  # its settings, as recipes have them; most: features kept


def _frechet(name: str, prefix: str = "") -> Metric:
    def compute(found: "Chunks", real: Mapping[str, Tensor], _: Tensor) -> float:
        return frechet_distance(real[f"{prefix}mean"], real[f"{prefix}covariance"], *moments(found.stream(name)))

    return Metric(compute, needs=f"{prefix}mean", lower=True)


def _nearest(compute: Callable[[Tensor, Tensor], float | tuple[float, float]], **options: object) -> Metric:
    """A metric of the features themselves, real ones and found ones."""
    options = {"most": FEATURES_KEPT, **options}
    found_some = lambda found, real, _: compute(real["features"], found.some("features", FEATURES_KEPT))  # noqa: E731
    return Metric(found_some, needs="features", options=options)


# By name, in the order in which scores are given.
METRICS: dict[str, Metric] = {
    **dict.fromkeys(("fid", "fdd", "fvd", "fd"), _frechet("features")),
    "sfid": _frechet("spatial", "spatial_"),
    "is": Metric(lambda found, real, labels: inception_score(found.read("logits")), options={"splits": 10, "seed": 0}),
    "kid": replace(_nearest(kernel_distance, subsets=100, subset_size=1000, seed=0), lower=True),
    "precision": _nearest(lambda real, found: manifold_share(found, real), neighbours=NEIGHBOURS),
    "recall": _nearest(manifold_share, neighbours=NEIGHBOURS),
    "accuracy": Metric(lambda found, real, labels: (found.read("label") == labels).double().mean().item(), "labels"),
    "steady": Metric(lambda found, real, labels: found.read("steady").double().mean().item()),
}
