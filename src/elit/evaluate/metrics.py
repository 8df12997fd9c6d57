"""Distances between feature statistics; pure functions in float64."""

import torch
from torch import Tensor


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """|μ1 − μ2|² + tr(Σ1 + Σ2 − 2·(Σ1·Σ2)^½), the distance behind FID and FDD.

    tr (Σ1·Σ2)^½ is the sum of the square roots of the eigenvalues of Σ1^½·Σ2·Σ1^½, which is symmetric, so singular
    covariances need no special care.
    """
    mean1, cov1, mean2, cov2 = (value.double() for value in (mean1, cov1, mean2, cov2))
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross)
