"""Inside an ELIT network: what Read reads, where the loss is, which latents matter (paper Figures 2 and 12).

B samples, D draws of noise for each, T times, G groups, n tokens of a group, N = G·n tokens in group-major order,
J̃ latents kept of a group.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from elit.arguments import whole_number
from elit.budgets import Budget
from elit.evaluate.inspect.attention import interface_of, watched_read
from elit.flow.path import interpolate, target_velocity
from elit.models.conditioning import Condition, concatenate
from elit.models.interface import LatentInterface
from elit.models.layers import Rope, patchify
from elit.models.transformer import Transformer
from elit.sampling.sample import seeded_noise

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
Tick = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Samples, noise and times that every measurement looks at alike, so that differences are the network's.

    Draw i of sample b has the noise of seed + i·B + b, the same at every time. Raises ValueError for what is not valid.
    """

    x: Tensor
    """(B, C, ...) data as the network takes it, B at least 2."""
    y: Condition
    """What the samples are of, B rows."""
    times: tuple[float, ...] = TIMES
    """0 = noise, 1 = data; means over them count each alike."""
    draws: int = 4
    """D, draws of noise that each sample is seen through; loss maps of a single one are mostly that noise."""
    seed: int = 0
    batch_size: int = 64
    """Rows in one forward."""

    def __post_init__(self) -> None:
        if not isinstance(self.x, Tensor):
            raise TypeError(f"x: a {type(self.x).__name__}, expected a tensor")
        if self.x.ndim not in (4, 5):
            raise ValueError(f"x: shape {tuple(self.x.shape)}, expected (B, C, H, W), or (B, C, T, H, W) of clips")
        if len(self.x) < 2 or len(self.y) != len(self.x):
            raise ValueError(f"x, y: {len(self.x)} samples and {len(self.y)} conditions; give as many, at least 2")
        if isinstance(self.times, Tensor):
            object.__setattr__(self, "times", tuple(self.times.flatten().tolist()))
        if not self.times or not all(0 <= t <= 1 for t in self.times):
            raise ValueError(f"times={self.times}: give at least one in [0, 1], 0 = noise, 1 = data")
        for name in ("draws", "batch_size"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 1))

    @property
    def forwards(self) -> int:
        """Forwards of one measurement."""
        return len(self.times) * math.ceil(self.draws * len(self.x) / self.batch_size)

    @torch.no_grad()
    def run(self, model: Transformer, budget: Budget, tick: Tick | None = None) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Forward after forward: which time, which samples (b,), their squared errors in group-major tokens (b, N).

        A token's error is the mean over its pixels and channels, float32 on the CPU: their mean over tokens is the
        training loss. Raises FloatingPointError where the network's velocity is not finite.
        """
        x1 = self.x.repeat(self.draws, *[1] * (self.x.ndim - 1))
        x0 = seeded_noise(range(self.seed, self.seed + len(x1)), self.x.shape[1:])
        y, samples = concatenate([self.y] * self.draws), torch.arange(len(x1)) % len(self.x)
        window = model.window(self.x.shape[2:])
        for i, time in enumerate(self.times):
            for rows in torch.arange(len(x1)).split(self.batch_size):
                t = torch.full((len(rows),), time)
                x = interpolate(x0[rows], x1[rows], t).to(model.device, model.dtype)
                velocity = model(x, t.to(model.device), y[rows].to(model.device), budget).float().cpu()
                error = (velocity - target_velocity(x0[rows], x1[rows])).square()
                tokens = patchify(error, model.patch_size, window).mean(-1)
                if not tokens.isfinite().all():
                    raise FloatingPointError(f"model: its velocity at t = {time:g} is not finite")
                yield i, samples[rows], tokens
                if tick:
                    tick()


@dataclass(frozen=True)
class Look:
    """What Read reads and where the loss is; means over draws, tokens group-major, float64."""

    attention: Tensor
    """(T, B, N): attention to each token, mean over heads, summed over latents. A latent's weights sum to 1 over its
    window, so this says how much a token is read, and its sum over a window is J̃."""
    loss: Tensor
    """(T, B, N): flow-matching loss of each token."""
    latents: Tensor
    """(B, N, J̃): how much each latent reads of each token of its window, mean over the times."""
    entropy: Tensor
    """(T, B, J̃): entropy in nats of what a latent reads, mean over windows; log n where it reads all tokens alike."""
    tokens_per_group: int
    """n."""

    def correlation(self) -> Tensor:
        """(T, B): rank correlation of attention and loss over the tokens of a sample; NaN where one is constant."""
        return rank_correlation(self.attention, self.loss)

    def correlation_in_windows(self) -> Tensor:
        """(T, B): the same inside each window, where attention can choose; mean over windows in which it varies."""
        attention, loss = (part.unflatten(2, (-1, self.tokens_per_group)) for part in (self.attention, self.loss))
        return rank_correlation(attention, loss).nanmean(-1)


def look(model: Transformer, probe: Probe, budget: Budget = None, tick: Tick | None = None) -> Look:
    """Read attention and flow-matching loss of every sample and time (paper Figures 2 and 12), from the same forwards.

    tick: called after each of `probe.forwards` forwards. Raises ValueError for a baseline.
    """
    n = len(interface_of(model).position)
    seen: dict[str, Tensor] = {}
    shape, share = (len(probe.times), len(probe.x)), 1 / probe.draws
    with watched_read(model) as maps:
        for i, samples, loss in probe.run(model, budget, tick):
            weights = maps.pop().mean(1).double().cpu().unflatten(0, (len(samples), -1))  # (b, G, J̃, n)
            entropy = -torch.xlogy(weights, weights).sum(-1).mean(1)  # (b, J̃)
            measured = {"attention": weights.sum(2).flatten(1), "loss": loss.double(), "entropy": entropy}
            latents = weights.transpose(2, 3).flatten(1, 2) / len(probe.times)  # (b, N, J̃)
            for name, value in measured.items():
                total = seen.setdefault(name, torch.zeros(*shape, *value.shape[1:], dtype=torch.float64))
                total[i].index_add_(0, samples, share * value)
            total = seen.setdefault("latents", torch.zeros(shape[1], *latents.shape[1:], dtype=torch.float64))
            total.index_add_(0, samples, share * latents)
    return Look(**seen, tokens_per_group=n)


def losses(model: Transformer, probe: Probe, budget: Budget = None, tick: Tick | None = None) -> Tensor:
    """(T, B): flow-matching loss of every sample and time, mean over draws, float64; for any network."""
    total = torch.zeros(len(probe.times), len(probe.x), dtype=torch.float64)
    for i, samples, tokens in probe.run(model, budget, tick):
        total[i].index_add_(0, samples, tokens.mean(1).double() / probe.draws)
    return total


@contextmanager
def only_latents(model: Transformer, slots: Sequence[int]) -> Iterator[int]:
    """Inside the block the network has these of its latents alone, each in its own place; gives their number, which
    must be the budget of every forward there.

    What is dropped is not computed, as with a budget; `slots` = 0 … J̃ − 1 is budget J̃. The others keep their RoPE
    coordinates. Read's latents are exchanged by a hook and the coordinates by a method of this one object, both gone
    after the block, so that a network that nobody looks at knows nothing of this.
    Raises ValueError for a baseline, slots that are not there, not ascending, or no valid budget together.
    """
    interface, indices = interface_of(model), torch.as_tensor(slots)
    if not isinstance(interface, LatentInterface):  # the published SiT reads all its latents at every budget
        raise ValueError(f"model: {type(model).__name__} uses its dropped latents too; give another ELIT model")
    valid, step = len(interface.latents), model.budget_step
    ascending = all(a < b for a, b in pairwise(slots))
    if not len(slots) or not ascending or not 0 <= slots[0] <= slots[-1] < valid or len(slots) not in model.budgets:
        raise ValueError(f"slots={list(slots)}: give some of 0 to {valid - 1}, ascending, a multiple of {step} of them")
    indices = indices.to(interface.latents.device)
    of_class = model.rope

    def rope(grid: tuple[int, ...], num_latents: int | None, x: Tensor) -> Rope:
        if num_latents is None:
            return of_class(grid, None, x)
        whole = of_class(grid, valid, x)  # of all latents of every group, slot by slot
        return Rope(*(table.unflatten(0, (-1, valid))[:, indices].flatten(0, 1) for table in whole))

    hook = interface.reader.register_forward_pre_hook(lambda _, inputs: (interface.latents[indices], *inputs[1:]))
    model.rope = rope
    try:
        yield len(slots)
    finally:
        hook.remove()
        del model.rope


def single_drops(model: Transformer) -> list[list[int]]:
    """What `losses_without` drops, one after the other: each slot; where budgets are multiples (HDiT), each merged
    group of slots. Empty where there is but one."""
    step, count = model.budget_step, len(interface_of(model).latents)
    drops = [list(range(first, first + step)) for first in range(0, count, step)]
    return drops if len(drops) > 1 else []


def losses_without(model: Transformer, probe: Probe, dropped: Sequence[int], tick: Tick | None = None) -> Tensor:
    """`losses` with the latents in the slots `dropped` gone from every group: (T, B)."""
    slots = [slot for slot in range(len(interface_of(model).latents)) if slot not in dropped]
    with only_latents(model, slots) as budget:
        return losses(model, probe, budget, tick)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation along the last dimension, ties at their mean rank; (..., N) twice -> (...), float64.

    NaN where one of the two is constant. scipy's own spearmanr takes no pairs of rows.
    """
    from scipy.stats import rankdata

    ranks = (torch.from_numpy(rankdata(part.detach().cpu().double().numpy(), axis=-1)) for part in (a, b))
    rank_a, rank_b = (rank - rank.mean(-1, keepdim=True) for rank in ranks)
    return (rank_a * rank_b).sum(-1) / (rank_a.square().sum(-1) * rank_b.square().sum(-1)).sqrt()
