"""Which tokens of a window are carried at which budget, and where everything lies in a model's raster sequence.

B batch, G groups (windows), n tokens of a window, J̃ of them carried; N and K in all. A grid that does not divide has
smaller windows too, `models/windows.py`.
"""

from functools import cache, lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from elit.models.layers import grid_positions
from elit.models.layout import share
from elit.models.windows import make_windows


@cache
def coarse_to_fine(window: tuple[int, ...]) -> tuple[int, ...]:
    """The n places of a window (raster indices), ordered so that any prefix covers the window evenly.

    Each next place is the one farthest from those before it, on a torus, because windows lie side by side; of equally
    far ones the one with most room around it. Where sides are powers of two this is the bit-reversed order.
    """
    places = grid_positions(window, window, torch.device("cpu")).double()  # (n, axes)
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
    """(n, J̃): what each place of a window takes from the carried: the mean of those nearest to it; rows sum to 1."""
    places = grid_positions(window, window, torch.device("cpu"))
    distance = torch.cdist(places, places[list(coarse_to_fine(window)[:num_latents])])  # (n, J̃)
    nearest = (distance < distance.amin(1, keepdim=True) + 1e-4).float()
    return nearest / nearest.sum(1, keepdim=True)


class Carried(NamedTuple):
    """All windows of one shape that keep the same number of tokens: one batch of groups for Read and Write."""

    windows: int
    shape: tuple[int, ...]
    num_latents: int
    """J̃: of each of these windows."""
    slots: Tensor
    """(J̃,) the place in its window that a slot is carried from."""
    spread: Tensor
    """(n, J̃), see `spread_to_window`; at J̃ = n, (n,) the slot of each place."""

    @property
    def tokens(self) -> int:
        """n: of one window."""
        return prod(self.shape)


class TokenOrder(NamedTuple):
    """Where tokens lie: in the model's own order, group by group, and among the carried ones."""

    window: tuple[int, ...]
    num_latents: int
    """J̃ of a full window."""
    full: bool
    """All are carried: the sequence is then the model's own, and nothing needs to move."""
    parts: tuple[Carried, ...]
    """The windows by shape; in group-major order one part follows the other."""
    grouped: Tensor
    """(N,) places in the sequence, group by group."""
    ungrouped: Tensor
    """(N,) its inverse."""
    carried: Tensor
    """(K,) places of the carried tokens, ascending: in the core they keep the model's own order."""
    to_core: Tensor
    """(K,) for each carried token its number among the latents group by group."""
    from_core: Tensor
    """(K,) its inverse."""


@torch.compiler.disable
@lru_cache(maxsize=256)
def make_token_order(
    grids: tuple[tuple[int, ...], ...],
    window: tuple[int, ...],
    num_latents: int | tuple[int, ...],
    device: torch.device,
) -> TokenOrder:
    """The order for one or more token grids that follow each other in a sequence, cut into windows of at most `window`.

    num_latents: of a full window, for all grids or one a grid. A smaller window keeps the same share, at least one.
    """
    counts = (num_latents,) * len(grids) if isinstance(num_latents, int) else num_latents
    # Kept for later calls, of which some may train: a tensor of inference mode could not take part.
    with torch.inference_mode(False):
        pieces: dict[tuple[tuple[int, ...], int], list[Tensor]] = {}  # (G, n) places, by shape and J̃
        before = 0
        for grid, count in zip(grids, counts, strict=True):
            windows = make_windows(grid, window, torch.device("cpu"))
            for shape, places in zip(windows.shapes, windows.order.split(windows.sizes), strict=True):
                part = shape, share(count, prod(shape), prod(window))
                pieces.setdefault(part, []).append(before + places.view(-1, prod(shape)))
            before += prod(grid)
        parts, grouped, carried = [], [], []
        for (shape, count), blocks in pieces.items():
            places, order = torch.cat(blocks), torch.tensor(coarse_to_fine(shape)[:count])
            grouped.append(places.flatten())
            carried.append(places[:, order].flatten())
            spread = order.argsort() if count == prod(shape) else spread_to_window(shape, count)
            parts.append(Carried(len(places), shape, count, order.to(device), spread.to(device)))
        tokens = torch.cat(grouped)  # (N,)
        sequence, to_core = torch.cat(carried).sort()  # each (K,)
        moves = (tokens, tokens.argsort(), sequence, to_core, to_core.argsort())
        full = len(sequence) == len(tokens)
        return TokenOrder(window, counts[0], full, tuple(parts), *(tensor.to(device) for tensor in moves))
