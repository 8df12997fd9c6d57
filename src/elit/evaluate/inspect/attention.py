"""Read's attention and the loss of every token (paper Figures 2 and 12): B samples, D draws, T times, G groups."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from scipy.stats import rankdata
from torch import Tensor

from elit.budgets import Budget
from elit.files import Json
from elit.flow.path import interpolate, target_velocity
from elit.models.conditioning import Condition, concatenate
from elit.models.interface import LatentInterface
from elit.models.layers import patchify, unpatchify
from elit.models.transformer import Transformer
from elit.sampling.engine import seeded_noise

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


def read_attention(model: Transformer, x: Tensor, t: Tensor, y: Condition, budget: Budget = None) -> Tensor:
    """Attention of latent j to each token of its own window, mean over heads: (B, J̃, *token grid)."""
    with recorded_attention(model) as maps, torch.no_grad():
        model(x, t, y, budget)
    if len(maps) > 1:
        raise ValueError("cannot map attention over windows of several sizes: give a size that divides into them")
    weights = maps[0].mean(1)  # (B·G, J̃, n)
    tokens = weights.unflatten(0, (len(x), -1)).transpose(2, 3).flatten(1, 2)  # (B, N, J̃)
    return as_grid(model, tokens, x.shape[2:])


@contextmanager
def recorded_attention(model: Transformer) -> Iterator[list[Tensor]]:
    """A list to which every forward adds Read's attention, (B·G, H, J̃, n), for each shape of windows."""
    reader = interface_of(model).reader
    maps: list[Tensor] = []

    def record(_: object, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        latents, tokens, c = inputs
        maps.append(reader.attention.weights(*reader.inputs(latents, tokens, *reader.modulate(c)[:2])))

    hook = reader.register_forward_pre_hook(record)
    try:
        yield maps
    finally:
        hook.remove()


def as_grid(model: Transformer, tokens: Tensor, size: Sequence[int]) -> Tensor:
    """Group-major tokens (B, N, k) of samples of `size` in raster order: (B, k, *token grid)."""
    return unpatchify(tokens, (1,) * len(size), model.windows(size, tokens))


def interface_of(model: Transformer) -> LatentInterface:
    """Raises ValueError for a baseline."""
    if model.latent_interface is None:
        raise ValueError("cannot inspect a baseline, which has no Read: give an ELIT model")
    return model.latent_interface


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Samples, noise and times of all measurements. Draw i of sample b has the noise of seed + i·B + b."""

    x: Tensor  # (B, C, ...) data as the network takes it, B at least 2
    y: Condition  # conditions of the samples, B rows
    times: tuple[float, ...] = TIMES  # 0 = noise, 1 = data; means over them count each alike
    draws: int = 4  # D, draws of noise a sample; loss maps of a single one are mostly that noise
    seed: int = 0
    batch_size: int = 64  # rows in one forward
    names: tuple[str, ...] = ()  # class or caption of each sample
    origin: Json = field(default_factory=dict)  # origin of the samples, as JSON

    @torch.no_grad()
    def run(self, model: Transformer, budget: Budget) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Forwards: number of the time, samples (b,), their errors (b, N). Raises FloatingPointError if not finite."""
        x1 = self.x.repeat(self.draws, *[1] * (self.x.ndim - 1))
        x0 = seeded_noise(range(self.seed, self.seed + len(x1)), self.x.shape[1:])
        y, samples = concatenate([self.y] * self.draws), torch.arange(len(x1)) % len(self.x)
        windows = model.windows(self.x.shape[2:], self.x.cpu())
        for i, time in enumerate(self.times):
            for rows in torch.arange(len(x1)).split(self.batch_size):
                t = torch.full((len(rows),), time)
                x = interpolate(x0[rows], x1[rows], t).to(model.device, model.dtype)
                velocity = model(x, t.to(model.device), y[rows].to(model.device), budget).float().cpu()
                error = (velocity - target_velocity(x0[rows], x1[rows])).square()
                tokens = patchify(error, model.patch_size, windows).mean(-1)
                if not tokens.isfinite().all():
                    raise FloatingPointError(f"the model's velocity at t = {time:g} is not finite")
                yield i, samples[rows], tokens


@dataclass(frozen=True)
class ReadMaps:
    """Read's attention and the loss; means over draws, tokens group-major, float64."""

    attention: Tensor
    """(T, B, N): attention to each token, mean over heads, summed over latents. A latent's weights sum to 1 over its
    window, so the sum over a window is J̃."""
    loss: Tensor  # (T, B, N): flow-matching loss of each token
    latents: Tensor  # (B, N, J̃): attention of each latent to each token of its window, mean over the times
    tokens_per_group: int  # n

    def correlation(self) -> Tensor:
        """(T, B): rank correlation of attention and loss over the tokens of a sample; NaN where one is constant."""
        return rank_correlation(self.attention, self.loss)

    def correlation_in_windows(self) -> Tensor:
        """(T, B): the same inside each window, where attention can choose; mean over windows in which it varies."""
        attention, loss = (part.unflatten(2, (-1, self.tokens_per_group)) for part in (self.attention, self.loss))
        return rank_correlation(attention, loss).nanmean(-1)


def read_maps(model: Transformer, probe: Probe, budget: Budget = None) -> ReadMaps:
    maps: dict[str, Tensor] = {}
    shape, share = (len(probe.times), len(probe.x)), 1 / probe.draws
    with recorded_attention(model) as recorded:
        for i, samples, loss in probe.run(model, budget):
            weights = recorded.pop().mean(1).double().cpu().unflatten(0, (len(samples), -1))  # (b, G, J̃, n)
            for name, value in (("attention", weights.sum(2).flatten(1)), ("loss", loss.double())):
                total = maps.setdefault(name, torch.zeros(*shape, *value.shape[1:], dtype=torch.float64))
                total[i].index_add_(0, samples, share * value)
            latents = weights.transpose(2, 3).flatten(1, 2) / len(probe.times)  # (b, N, J̃)
            total = maps.setdefault("latents", torch.zeros(shape[1], *latents.shape[1:], dtype=torch.float64))
            total.index_add_(0, samples, share * latents)
    return ReadMaps(**maps, tokens_per_group=len(interface_of(model).position))


def losses(model: Transformer, probe: Probe, budget: Budget = None) -> Tensor:
    """(T, B): flow-matching loss of every sample and time, mean over draws; for any network."""
    total = torch.zeros(len(probe.times), len(probe.x), dtype=torch.float64)
    for i, samples, tokens in probe.run(model, budget):
        total[i].index_add_(0, samples, tokens.mean(1).double() / probe.draws)
    return total


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's along the last dimension, NaN for constants; scipy's own spearmanr takes no pairs of rows."""
    ranks = (torch.from_numpy(rankdata(part.detach().cpu().double().numpy(), axis=-1)) for part in (a, b))
    rank_a, rank_b = (rank - rank.mean(-1, keepdim=True) for rank in ranks)
    return (rank_a * rank_b).sum(-1) / (rank_a.square().sum(-1) * rank_b.square().sum(-1)).sqrt()
