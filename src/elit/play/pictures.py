"""Pictures for the page: enlarged, differences, overlays."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from torch import Tensor

SIDE = 384
"""Pixels of the longer side to which pictures are enlarged, by whole factors."""
WARM = (255, 106, 0)


def enlarge(image: Image.Image, side: int = SIDE) -> Image.Image:
    """Enlarges by a whole factor, without smoothing, so that the network's pixels stay visible."""
    factor = max(1, side // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def difference(first: Image.Image, second: Image.Image) -> tuple[Image.Image, float]:
    """|a − b| of two pictures, white where it is largest, and the largest as a share of the range."""
    apart = ImageChops.difference(first, second)
    largest = int(np.asarray(apart).max())
    return enlarge(apart.point(lambda value: value * 255 // max(largest, 1))), largest / 255


def overlay(image: Image.Image, weights: Tensor) -> Image.Image:
    """`image` enlarged and greyed, with weights (rows, columns) >= 0 over it: warm where they are large."""
    base = enlarge(image).convert("L").convert("RGB")
    scaled = weights.float() / weights.max().clamp(min=1e-12)
    large = F.interpolate(scaled[None, None], size=(base.height, base.width), mode="nearest")[0, 0]
    alpha = Image.fromarray((large * 210).to(torch.uint8).numpy())
    return Image.composite(Image.new("RGB", base.size, WARM), base, alpha)
