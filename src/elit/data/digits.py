"""The digits that come with scikit-learn: 1,797 real handwritten ones, 8×8 pixels, 10 classes."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from elit.data.images import ImageSet


def digits() -> ImageSet:
    """images (1797, 1, 8, 8) float32 in [-1, 1], labels (1797,) int64."""
    bunch = load_digits()
    images: Tensor = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 1
    return ImageSet(images, torch.tensor(bunch.target, dtype=torch.int64), tuple(map(str, range(10))))
