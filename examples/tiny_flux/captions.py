"""scikit-learn's digits with captions: RGB pictures and the words for them."""

import torch.nn.functional as F
from torch import Tensor

from elit.data.builtin import DIGITS, digits

SIZE = 16
TEMPLATES = ("a photo of a {}", "a picture of a {}", "a {} on black", "one {}")


def captions() -> list[str]:
    """All of them, template by template; within each, digit by digit."""
    return [template.format(name) for template in TEMPLATES for name in DIGITS]


def captioned_images(size: int = SIZE) -> tuple[Tensor, Tensor]:
    """images (1797, 3, size, size) float32 in [-1, 1], labels (1797,) int64."""
    data = digits()
    return enlarged(data.images, size).expand(-1, 3, -1, -1), data.labels


def enlarged(images: Tensor, size: int) -> Tensor:
    """(B, 1, 8, 8) -> (B, 1, size, size); `F.avg_pool2d` of that by size / 8 is close to what it was."""
    return F.interpolate(images, (size, size), mode="bicubic").clamp(-1, 1)
