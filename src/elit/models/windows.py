"""Sizes, and windows: how a token grid is cut into groups. A grid that divides has windows of one shape, others a few.

B batch, N spatial tokens, G windows, n tokens of a window, J̃ latents of a full window kept, K latents in all, d width.
Everything is arithmetic on sizes, so that under torch.compile grids and budgets may be symbolic numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce, wraps
from itertools import product
from math import prod
from operator import mul
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from elit.config import require

Shape = tuple[int, ...]
P = ParamSpec("P")
R = TypeVar("R")
N = TypeVar("N", int, Tensor)


@dataclass(frozen=True, kw_only=True)
class InterfaceSpec:
    """Position and size of the interface. Raises ValueError."""

    split: tuple[int, int, int]  # Blocks in the head (spatial tokens), the core (latents), the tail (spatial tokens).
    window: tuple[int, ...]  # Spatial tokens along each axis, (rows, columns) or (frames, rows, columns).
    num_latents: int  # J, latents of a window at full budget.

    def __post_init__(self) -> None:
        split, window = tuple(self.split), tuple(self.window)
        object.__setattr__(self, "split", split)
        object.__setattr__(self, "window", window)
        valid = len(split) == 3 and min(split) >= 0 and split[1] >= 1
        require(valid, "split", split, "(head, core, tail) block counts with at least 1 in the core")
        require(min(window, default=0) >= 1, "window", window, "at least 1 token along each axis")
        require(1 <= self.num_latents <= 1 << 20, "num_latents", self.num_latents, "at least 1")

    def to_config(self) -> dict[str, int | list[int]]:
        return {"split": list(self.split), "window": list(self.window), "num_latents": self.num_latents}


def as_size(sample_size: int | Sequence[int]) -> Shape:
    """An int is a square image."""
    size = (sample_size,) * 2 if isinstance(sample_size, int) else tuple(sample_size)
    require(min(size, default=0) >= 1, "sample_size", sample_size, "at least 1 along each axis")
    return size


def as_patch(patch_size: int | Sequence[int], sample_size: int | Sequence[int]) -> Shape:
    """An int is that many rows and columns, and one frame of a video."""
    axes = len(as_size(sample_size))
    patch = (1,) * (axes - 2) + (patch_size,) * 2 if isinstance(patch_size, int) else tuple(patch_size)
    require(min(patch, default=0) >= 1, "patch_size", patch_size, "at least 1 along each axis")
    return patch


class Windows:
    """A token grid cut into windows: along each axis the fewest parts of at most `window`, as equal as possible.

    83 tokens in windows of 8 are six of 8 and five of 7. Windows of one shape lie together, each shape one batch of
    groups: tokens are sorted shape by shape, window by window, in raster order inside each.

    step: budgets are multiples of it. shapes: each with the number of its windows, the largest first. order, inverse:
    (N,), `raster[order]` is sorted and `sorted[inverse]` in raster order.
    """

    def __init__(self, grid: Shape, window: Shape, step: int = 1, device: torch.device | None = None):
        self.grid, self.window, self.step, self.device = grid, window, step, device
        self.parts = [count_parts(length, side) for length, side in zip(grid, window, strict=True)]
        axes = [torch.arange(length, device=device) for length in grid]
        self.raster = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)  # (N, axes)
        self.places: list[Tensor] = []  # of tokens' windows, for each axis
        sides = []
        for token, length, parts in zip(self.raster.unbind(1), grid, self.parts, strict=True):
            at = ((token + 1) * parts - 1) // length
            self.places.append(at)
            sides.append((at + 1) * length // parts - at * length // parts)
        key = self._rank(sides)  # the rank of a token's window's shape, then its place
        for at, parts in zip(self.places, self.parts, strict=True):
            key = key * parts + at
        self.order = key.argsort(stable=True)
        self.inverse = self.order.argsort()

        options = []  # of an axis: `large` parts have one token more than the others
        for length, parts in zip(grid, self.parts, strict=True):
            small, large = length // parts, length % parts
            options.append([(small + 1, large), (small, parts - large)] if large else [(small, parts)])
        self.shapes: list[tuple[Shape, int]] = []
        for each in product(*options):
            shape, count = tuple([side for side, _ in each]), prod([count for _, count in each])
            before = [known for known, _ in self.shapes if self._rank(known) < self._rank(shape)]
            self.shapes.insert(len(before), (shape, count))

    def _rank(self, sides: Sequence[N]) -> N:
        """Rank of a shape: the larger area first, then the smaller first side."""
        rank = -reduce(mul, sides)
        for side, longest in zip(sides, self.window, strict=True):
            rank = rank * (longest + 1) + side
        return rank

    def latents(self, budget: int) -> list[int]:
        """Latents of a window of each shape where a full one has `budget`: the same share, a multiple of `step`."""
        full, step = prod(self.window), self.step
        tokens = [prod(shape) for shape, _ in self.shapes]
        nearest = [(2 * budget * n + full * step) // (2 * full * step) * step for n in tokens]
        return [budget if n == full else torch.sym_max(step, j) for n, j in zip(tokens, nearest, strict=True)]

    def groups(self, x: Tensor, budget: int | None = None) -> list[Tensor]:
        """Tokens (B, N, d) or, with a budget, latents (B, K, d) -> for each shape (B·G, n or J̃, d), views."""
        lengths = [prod(shape) for shape, _ in self.shapes] if budget is None else self.latents(budget)
        chunks = x.split([count * length for (_, count), length in zip(self.shapes, lengths, strict=True)], 1)
        return [chunk.reshape(-1, length, x.shape[2]) for chunk, length in zip(chunks, lengths, strict=True)]

    def crops(self, table: Tensor) -> list[Tensor]:
        """A table over a full window (n, d), cropped to the first rows and columns of each shape, views."""
        whole = table.unflatten(0, self.window)
        return [whole[tuple(slice(side) for side in shape)].flatten(0, -2) for shape, _ in self.shapes]

    def coordinates(self, budget: int | None = None) -> Tensor:
        """Tokens (N, axes), or latents of a budget (K, 1 + axes): slot, then the window's place; float32, sorted."""
        if budget is None:
            return self.raster[self.order].float()
        places, latents = torch.stack(self.places, 1), []
        for tokens, length in zip(self.groups(places[None, self.order]), self.latents(budget), strict=True):
            place = tokens[:, :1].float().expand(-1, length, -1)  # (G, J̃, axes)
            slot = torch.arange(length, device=self.device, dtype=torch.float32)[:, None].expand(len(place), -1, 1)
            latents.append(torch.cat((slot, place), -1).flatten(0, 1))
        return joined(latents)


def count_parts(length: int, side: int) -> int:
    """The fewest parts of at most `side` that make up an axis."""
    return -(-length // side)


def joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors), dim)


def cut(tensor: Tensor, count: int) -> tuple[Tensor, ...]:
    """`count` equal parts of a batch whose size may be symbolic, for which `chunk` would fix it."""
    return tensor.unflatten(0, (count, -1)).unbind()


def remembered(make: Callable[P, R]) -> Callable[P, R]:
    """`make` with its results kept, but not of fake tensors nor in a trace, where a look-up would fix a symbol."""
    kept = lru_cache(maxsize=256)(make)

    @wraps(make)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or type(torch.empty(0)) is not Tensor:
            return make(*args, **kwargs)
        # Kept for later calls, of which some may train: a tensor of inference mode could not take part.
        with torch.inference_mode(False):
            return kept(*args, **kwargs)

    return call


windows_of = remembered(Windows)
