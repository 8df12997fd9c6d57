"""Pictures beside and inside each other: differences, overlays, the frames of a run."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from elit.sampling.pictures import to_uint8

SIDE = 384
"""Pixels of the longer side to which pictures of the page are enlarged, in whole steps."""
WARM = (255, 106, 0)


def enlarge(image: Image.Image, side: int = SIDE) -> Image.Image:
    """By a whole factor, without smoothing, so that a network's pixels stay as they are."""
    factor = max(1, side // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def as_image(pixels: Tensor) -> Image.Image:
    """(C, H, W) in [-1, 1], C = 1 or 3, of a clip (C, T, H, W) the first frame, as RGB."""
    still = pixels[:, 0] if pixels.ndim == 4 else pixels
    channels_last = to_uint8(still).expand(3, -1, -1).permute(1, 2, 0)
    return Image.fromarray(channels_last.contiguous().numpy())


def difference(first: Tensor, second: Tensor) -> tuple[Image.Image, float]:
    """|a − b| of two pictures, white where it is largest, and the largest as a share of the range."""
    apart = (first.clamp(-1, 1) - second.clamp(-1, 1)).abs().amax(0, keepdim=True) / 2
    largest = float(apart.max())
    return enlarge(as_image(2 * apart / max(largest, 1e-6) - 1)), largest


def overlay(image: Image.Image, weights: Tensor) -> Image.Image:
    """`image` enlarged and greyed, with weights (rows, columns) >= 0 over it: warm where they are large."""
    base = enlarge(image).convert("L").convert("RGB")
    scaled = weights.float() / weights.max().clamp(min=1e-12)
    large = F.interpolate(scaled[None, None], size=(base.height, base.width), mode="nearest")[0, 0]
    alpha = Image.fromarray((large * 210).to(torch.uint8).numpy())
    return Image.composite(Image.new("RGB", base.size, WARM), base, alpha)


def evenly(count: int, most: int) -> list[int]:
    """`most` of 0 … count − 1, evenly spaced, the first and the last among them; all if there are fewer."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def display_budgets(budgets: Sequence[int], most: int = 16) -> list[int]:
    """Of all budgets at most so many, ascending."""
    return [budgets[i] for i in evenly(len(budgets), most)]
