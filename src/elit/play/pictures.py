"""Pictures for the page: enlarged, differences, and a look inside the run of one."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from torch import Tensor

from elit.budgets import evenly_spaced, schedule_budgets
from elit.evaluate.inspect.attention import read_attention
from elit.play.renderer import Picture
from elit.sampling.autoencoders import decode
from elit.sampling.engine import NetworkEngine
from elit.sampling.pictures import image_grid

FRAMES = 9
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


@torch.no_grad()
def attention_maps(engine: NetworkEngine, picture: Picture) -> tuple[list[float], Tensor]:
    """Times and maps (T, J̃, rows, columns) of what each latent reads at every step, mean over heads, on the CPU.

    J̃ is the largest budget of a step; of a clip the first frame. Raises ValueError for a network without Read.
    """
    model, y = engine.network, engine.conditions([picture.request.condition])
    maps, times = [], [t for t, _ in picture.states[:-1]]
    budgets = schedule_budgets(picture.request.sampling.budget, times, engine.budgets)
    budget = max(each for each in budgets if each is not None)
    for t, x in picture.states[:-1]:
        x = x.to(model.device, model.dtype)
        maps.append(read_attention(model, x, torch.tensor([t], device=x.device), y, budget).float().cpu())
    weights = torch.cat(maps)
    return times, weights[:, :, 0] if weights.ndim == 5 else weights


@torch.no_grad()
def trajectory(engine: NetworkEngine, picture: Picture) -> list[tuple[Image.Image, str]]:
    """States of the run from noise to picture, evenly spaced over its steps, with their times."""
    states = evenly_spaced(picture.states, FRAMES)
    stills = [decode(engine.vae, x.to(engine.network.device)).float().cpu() for _, x in states]
    images = [image_grid(still[:, :, 0] if still.ndim == 5 else still, 1) for still in stills]
    return [(enlarge(image, 192), f"t = {t:.2f}") for image, (t, _) in zip(images, states, strict=True)]
