"""Looking inside the run that made a picture: what Read read, which latents mattered, the way from noise."""

import threading

import torch
from PIL import Image
from torch import Tensor

from elit.budgets import schedule_budgets
from elit.evaluate.inspect.attention import read_attention
from elit.evaluate.inspect.left_out import only_latents, single_drops
from elit.models.conditioning import Condition
from elit.play.engine import Cancelled, NetworkEngine, Picture, Tick
from elit.play.pictures import as_image, enlarge, evenly
from elit.sampling.draw import as_pixels, conditions_of

FRAMES, TIMES = 9, 4


@torch.no_grad()
def attention_maps(engine: NetworkEngine, picture: Picture) -> tuple[list[float], Tensor]:
    """What each latent reads at every step: times and (T, J̃, rows, columns), mean over heads, on the CPU.

    J̃ is the most that a step kept; of a clip the first frame. What a latent reads does not depend on the others.
    Raises ValueError for a network without Read.
    """
    times, x, y, budget = _states(engine, picture, range(len(picture.states) - 1))
    maps = []
    for rows in torch.arange(len(x)).split(16):
        t = torch.tensor([times[i] for i in rows.tolist()], device=x.device)
        maps.append(read_attention(engine.model, x[rows], t, y[rows], budget).float().cpu())
    weights = torch.cat(maps)
    return times, weights[:, :, 0] if engine.clips else weights


@torch.no_grad()
def latents_that_matter(
    engine: NetworkEngine, picture: Picture, tick: Tick | None = None, stop: threading.Event | None = None
) -> list[tuple[str, float]]:
    """How far the velocity moves when a latent is left out of every group, over its own size: (latent, share) each.

    Root mean squares over the picture and up to four of the run's steps. Where budgets come in multiples (HDiT), as
    many latents are left out together. Raises ValueError where single latents cannot be left out.
    """
    steps = evenly(len(picture.states) - 1, TIMES)
    times, x, y, budget = _states(engine, picture, steps)
    t = torch.tensor(times, device=x.device)
    if budget is None:
        raise ValueError("this network has no latents to leave out")
    drops = [slots for slots in single_drops(engine.model) if slots[-1] < budget]
    if len(drops) < 2:
        raise ValueError("at this budget there is nothing to leave out; turn it up")
    whole = engine.model(x, t, y, budget).float()
    shares = []
    for number, dropped in enumerate(drops):
        if stop is not None and stop.is_set():
            raise Cancelled
        if tick:
            tick(number, len(drops))
        with only_latents(engine.model, [slot for slot in range(budget) if slot not in dropped]) as num_latents:
            apart = engine.model(x, t, y, num_latents).float() - whole
        share = (apart.square().mean() / whole.square().mean().clamp(min=1e-12)).sqrt()
        name = str(dropped[0] + 1) if len(dropped) == 1 else f"{dropped[0] + 1}–{dropped[-1] + 1}"
        shares.append((name, float(share)))
    return shares


def trajectory(engine: NetworkEngine, picture: Picture) -> list[tuple[Image.Image, str]]:
    """The run's states from noise to picture, evenly spaced over its steps, with their times."""
    frames = []
    for i in evenly(len(picture.states), FRAMES):
        t, x = picture.states[i]
        pixels = as_pixels(x.to(engine.model.device), engine.vae, 1)[0].float().cpu()
        frames.append((enlarge(as_image(pixels), 192), f"t = {t:.2f}"))
    return frames


def _states(
    engine: NetworkEngine, picture: Picture, steps: list[int] | range
) -> tuple[list[float], Tensor, Condition, int | None]:
    """Times, states (T, C, ...), conditions of as many rows, and the most latents that a step kept."""
    settings, device = picture.settings, engine.model.device
    times = [picture.states[i][0] for i in steps]
    x = torch.cat([picture.states[i][1] for i in steps]).to(device, engine.model.dtype)
    y = conditions_of(engine.model, settings.labels, settings.prompts, settings.text_encoder).to(device)
    step_budgets = schedule_budgets(settings.arguments()["budget"], times, engine.model.budgets)
    most = max((count for count in step_budgets if count is not None), default=None)
    return times, x, y[torch.zeros(len(times), dtype=torch.long)], most
