"""Which tokens of a window are carried at which budget, and where everything lies in a model's raster sequence.

B batch, G groups (windows), n tokens of a window, N = G·n, J̃ of them carried, K = G·J̃.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from elit.models.layers import grid_positions, token_grid


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

    chosen = [int((places - (sides / 2).floor()).square().sum(-1).argmin())]  # the middle serves a lone token best
    nearest, crowd = squared[chosen[0]], crowding[chosen[0]]
    while len(chosen) < len(places):
        far = nearest > nearest.max() - 1e-6
        chosen.append(int(torch.where(far, (crowd * 1e6).round(), torch.inf).argmin()))
        nearest, crowd = torch.minimum(nearest, squared[chosen[-1]]), crowd + crowding[chosen[-1]]
    return tuple(chosen)


def spread_to_window(window: tuple[int, ...], kept: int) -> Tensor:
    """(n, J̃): what each place of a window takes from the carried: the mean of those nearest to it; rows sum to 1."""
    places = grid_positions(window, window, torch.device("cpu"))
    distance = torch.cdist(places, places[list(coarse_to_fine(window)[:kept])])  # (n, J̃)
    nearest = (distance < distance.amin(1, keepdim=True) + 1e-4).float()
    return nearest / nearest.sum(1, keepdim=True)


class Plan(NamedTuple):
    """Where tokens lie: in the model's own order, group by group, and among the carried ones."""

    kept: int
    """J̃."""
    full: bool
    """All are carried: the sequence is then the model's own, and nothing needs to move."""
    grouped: Tensor
    """(N,) places in the sequence, group by group."""
    ungrouped: Tensor
    """(N,) its inverse."""
    carried: Tensor
    """(K,) places of the carried tokens, ascending: in the core they keep the model's own order."""
    to_core: Tensor
    """(K,) for each carried token its number among the latents group by group, g·J̃ + slot."""
    from_core: Tensor
    """(K,) its inverse."""
    slots: Tensor
    """(J̃,) the place in its window that a slot is carried from."""
    spread: Tensor
    """(n, J̃), see `spread_to_window`."""


@torch.compiler.disable
@lru_cache(maxsize=256)
def make_plan(grids: tuple[tuple[int, ...], ...], window: tuple[int, ...], kept: int, device: torch.device) -> Plan:
    """The plan for one or more token grids that follow each other in a sequence, all cut into `window`s.

    Raises ValueError, naming the nearest sizes, where a grid does not divide.
    """
    # Kept for later calls, of which some may train: a tensor of inference mode could not take part.
    with torch.inference_mode(False):
        grouped = torch.cat(_group_major(grids, window))  # (N,)
        order = torch.tensor(coarse_to_fine(window)[:kept])
        carried, to_core = grouped.view(-1, prod(window))[:, order].flatten().sort()  # each (K,)
        spread = spread_to_window(window, kept)
        tensors = (grouped, grouped.argsort(), carried, to_core, to_core.argsort(), order, spread)
        return Plan(kept, kept == prod(window), *(tensor.to(device) for tensor in tensors))


def _group_major(grids: Sequence[tuple[int, ...]], window: tuple[int, ...]) -> list[Tensor]:
    places, before = [], 0
    for grid in grids:
        token_grid(grid, (1,) * len(grid), window)
        coordinates = grid_positions(grid, window, torch.device("cpu")).long()
        strides = torch.tensor([prod(grid[i + 1 :]) for i in range(len(grid))])
        places.append(before + (coordinates * strides).sum(1))
        before += prod(grid)
    return places
