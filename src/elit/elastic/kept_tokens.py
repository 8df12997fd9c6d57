"""Which tokens of a window are kept at which budget, and where they lie in a model's raster sequence.

B batch, G windows, n tokens of a window, J̃ of them kept; N and K in all.
"""

from functools import cache, lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from elit.models.windows import Shape, Windows, joined


@cache
def coarse_to_fine(window: tuple[int, ...]) -> tuple[int, ...]:
    """The n places of a window (raster indices), ordered so that any prefix covers the window evenly.

    Each next place is the one farthest from those before it, on a torus, because windows lie side by side; of equally
    far ones the one with most room around it. Where sides are powers of two this is the bit-reversed order.
    """
    places = Windows(window, window).raster.double()  # (n, axes)
    sides = torch.tensor(window, dtype=torch.float64)
    apart = (places[:, None] - places).abs()
    squared = torch.minimum(apart, sides - apart).square().sum(-1)  # (n, n)
    crowding = 1 / squared.clamp(min=1e-9)

    order = [int((places - (sides / 2).floor()).square().sum(-1).argmin())]  # the middle serves a lone token best
    nearest, crowd = squared[order[0]], crowding[order[0]]
    while len(order) < len(places):
        far = nearest > nearest.max() - 1e-6
        order.append(int(torch.where(far, (crowd * 1e6).round(), torch.inf).argmin()))
        nearest, crowd = torch.minimum(nearest, squared[order[-1]]), crowd + crowding[order[-1]]
    return tuple(order)


def spread_to_window(window: tuple[int, ...], num_latents: int) -> Tensor:
    """(n, J̃): the mean that each place of a window takes of the kept tokens nearest to it; rows sum to 1."""
    places = Windows(window, window).raster.float()
    distance = torch.cdist(places, places[list(coarse_to_fine(window)[:num_latents])])  # (n, J̃)
    nearest = (distance < distance.amin(1, keepdim=True) + 1e-4).float()
    return nearest / nearest.sum(1, keepdim=True)


class KeptGrid(NamedTuple):
    """One token grid of a sequence at its budget; entry i of a table is for windows of shape i."""

    windows: Windows
    budget: int
    slots: list[Tensor]
    """(J̃,) the place in its window that a latent is kept from."""
    spreads: list[Tensor]
    """(n, J̃), see `spread_to_window`; at J̃ = n, (n,) the slot of each place."""

    def spread(self, latents: Tensor) -> Tensor:
        """Latents (B, K, d) -> tokens (B, N, d): each takes the mean of the nearest kept ones."""
        groups = zip(self.windows.groups(latents, self.budget), self.spreads, strict=True)
        spread = [x[:, table] if table.ndim == 1 else table.to(x.dtype) @ x for x, table in groups]
        return joined([x.reshape(len(latents), -1, x.shape[2]) for x in spread], 1)


class KeptTokens(NamedTuple):
    """The places of tokens: in the model's own order, window by window, and among the kept ones."""

    grids: list[KeptGrid]
    full: bool
    """All are kept: the sequence is then the model's own, and nothing needs to move."""
    order: Tensor
    """(N,) places in the sequence, grid by grid and window by window."""
    inverse: Tensor
    """(N,) its inverse."""
    kept: Tensor
    """(K,) places of the kept tokens, ascending: in the core they keep the model's own order."""
    to_core: Tensor
    """(K,) for each kept token its number among the latents window by window."""
    from_core: Tensor
    """(K,) its inverse."""
    tokens: list[int]
    """N of each grid."""
    latents: list[int]
    """K of each grid."""


@torch.compiler.disable
@lru_cache(maxsize=256)
def kept_tokens(
    grids: tuple[Shape, ...], window: Shape, budgets: int | tuple[int, ...], device: torch.device
) -> KeptTokens:
    """The kept tokens of one or more token grids that follow each other in a sequence.

    budgets: latents of a full window, for all grids or one a grid. A smaller window keeps the same share, at least one.
    """
    budgets = (budgets,) * len(grids) if isinstance(budgets, int) else budgets
    # Kept for later calls, of which some may train: a tensor of inference mode could not take part.
    with torch.inference_mode(False):
        kept_grids: list[KeptGrid] = []
        order, kept, before = [], [], 0
        for grid, budget in zip(grids, budgets, strict=True):
            windows = Windows(grid, window)
            places = before + windows.order
            shapes = [shape for shape, _ in windows.shapes]
            slots = [
                torch.tensor(coarse_to_fine(shape)[:j])
                for shape, j in zip(shapes, windows.latents(budget), strict=True)
            ]
            spreads = [
                slot.argsort() if len(slot) == prod(shape) else spread_to_window(shape, len(slot))
                for shape, slot in zip(shapes, slots, strict=True)
            ]
            groups = windows.groups(places[None, :, None])
            kept.append(torch.cat([tokens[:, slot].flatten() for tokens, slot in zip(groups, slots, strict=True)]))
            order.append(places)
            tables = ([table.to(device) for table in each] for each in (slots, spreads))
            kept_grids.append(KeptGrid(windows, budget, *tables))
            before += len(places)
        tokens = torch.cat(order)  # (N,)
        sequence, to_core = torch.cat(kept).sort()  # each (K,)
        moves = [tokens, tokens.argsort(), sequence, to_core, to_core.argsort()]
        return KeptTokens(
            kept_grids,
            len(sequence) == len(tokens),
            *(tensor.to(device) for tensor in moves),
            tokens=list(map(len, order)),
            latents=list(map(len, kept)),
        )
