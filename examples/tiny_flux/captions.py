"""Fashion-MNIST with captions: 16x16 RGB pictures and the words for them."""

import gzip
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts it."""
SIZE = 16
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
TEMPLATES = ("a photo of a {}", "a picture of a {}", "a {} on black", "one {}")


def captions() -> list[str]:
    """All of them, template by template; within each, class by class."""
    return [template.format(name) for template in TEMPLATES for name in CLASSES]


def captioned_images(part: str = "train") -> tuple[Tensor, Tensor]:
    """images (M, 3, SIZE, SIZE) float32 in [-1, 1], labels (M,) int64; part: train or t10k."""
    pixels = _read(f"{part}-images-idx3-ubyte.gz", 16).view(-1, 1, 28, 28)
    padded = F.pad(pixels.float() / 127.5 - 1, (2, 2, 2, 2), value=-1.0)
    images = F.avg_pool2d(padded, 32 // SIZE).expand(-1, 3, -1, -1)
    return images, _read(f"{part}-labels-idx1-ubyte.gz", 8).long()


def _read(name: str, header: int) -> Tensor:
    with gzip.open(FOLDER / name) as file:
        return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)[header:]
