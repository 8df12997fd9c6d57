"""Mean and covariance of features, gathered batch by batch in float64."""

import torch
from torch import Tensor


class Moments:
    """Streaming mean and covariance of features (B, F); sums are float64 whatever the features are."""

    def __init__(self, features: int):
        self.count = 0
        self.sum = torch.zeros(features, dtype=torch.float64)
        self.outer = torch.zeros(features, features, dtype=torch.float64)

    def add(self, features: Tensor) -> "Moments":
        """Adds a batch (B, F); returns itself."""
        x = features.detach().to("cpu", torch.float64)
        self.count += len(x)
        self.sum += x.sum(0)
        self.outer += x.T @ x
        return self

    @property
    def mean(self) -> Tensor:
        return self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        """Unbiased, (F, F). Raises ValueError below two samples."""
        if self.count < 2:
            raise ValueError(f"{self.count} samples have no covariance; give at least 2")
        return (self.outer - torch.outer(self.sum, self.mean)) / (self.count - 1)
