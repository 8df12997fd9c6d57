"""Windows: how a grid of tokens is cut into groups, for a grid of any size.

N spatial tokens, G groups, n tokens of a group, J̃ latents of a full group kept.

`layout.py` says how many windows there are, and of which shapes. Windows of equal shape lie together in the
group-major order, so that each shape is one batch of groups.
"""

from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from elit.models.layout import Shape, count_windows, cut


class Windows(NamedTuple):
    """The windows of one grid, in group-major order: shape by shape, window by window."""

    shapes: tuple[Shape, ...]
    """Each shape that occurs, the largest first; one if the grid divides."""
    counts: tuple[int, ...]
    """How many windows have each shape."""
    groups: Tensor
    """(G, axes) where each window lies among the windows along each axis, int64."""
    order: Tensor
    """(N,) place in raster order of each token in group-major order, int64."""

    @property
    def sizes(self) -> list[int]:
        """Tokens of the windows of each shape, all together."""
        return [count * prod(shape) for shape, count in zip(self.shapes, self.counts, strict=True)]


def make_windows(grid: Shape, window: Shape, device: torch.device) -> Windows:
    cuts = [cut(length, side) for length, side in zip(grid, window, strict=True)]
    counts = count_windows(grid, window)
    strides = [prod(grid[axis + 1 :]) for axis in range(len(grid))]
    by_shape: dict[Shape, list[tuple[Shape, list[int]]]] = {shape: [] for shape in counts}
    for group in product(*(range(len(parts)) for parts in cuts)):
        sides = [parts[i] for parts, i in zip(cuts, group, strict=True)]
        raster = [sum(i * s for i, s in zip(place, strides, strict=True)) for place in product(*sides)]
        by_shape[tuple(map(len, sides))].append((group, raster))
    windows = [each for same in by_shape.values() for each in same]
    order = torch.tensor([place for _, raster in windows for place in raster], device=device)
    groups = torch.tensor([group for group, _ in windows], device=device)
    return Windows(tuple(counts), tuple(counts.values()), groups, order)


@lru_cache(maxsize=256)
def _known_windows(grid: Shape, window: Shape, device: torch.device) -> Windows:
    # Used by later calls too, of which some may train: a tensor of inference mode could not take part.
    with torch.inference_mode(False):
        return make_windows(grid, window, device)


def windows_of(grid: Shape, window: Shape, device: torch.device) -> Windows:
    """The windows of a grid, each no larger than `window`; made once for a grid, but in a trace."""
    make = make_windows if torch.compiler.is_compiling() else _known_windows
    return make(tuple(grid), tuple(window), device)


def corner(places: Tensor, shape: Shape, window: Shape) -> Tensor:
    """What is learned of each place of a full window (n, d), for a window of `shape`: that of its corner, a view."""
    if shape == window:
        return places
    return places.unflatten(0, window)[tuple(slice(side) for side in shape)].flatten(0, len(shape) - 1)
