"""A look inside the run of a picture: the attention of Read, and the states from noise to picture."""

import torch
from PIL import Image
from torch import Tensor

from elit.budgets import evenly_spaced, schedule_budgets
from elit.evaluate.inspect.attention import read_attention
from elit.play.pictures import enlarge
from elit.play.renderer import Picture
from elit.sampling.autoencoders import decode
from elit.sampling.engine import NetworkEngine
from elit.sampling.pictures import image_grid

FRAMES = 9


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
