"""Sizes of a network: samples, patches, the grid of tokens, and where the latent interface sits."""

from collections.abc import Sequence
from dataclasses import dataclass

from elit.config import require
from elit.models.windows import Shape

MAX_SETTING = 1 << 20
"""More than any network has of anything."""


@dataclass(frozen=True, kw_only=True)
class InterfaceSpec:
    """Position and size of the interface."""

    split: tuple[int, int, int]
    """Blocks in the head (spatial tokens), the core (latents) and the tail (spatial tokens)."""
    window: tuple[int, ...]
    """Spatial tokens of a window along each axis, (rows, columns) or (frames, rows, columns)."""
    num_latents: int
    """J, latents of a window at full budget."""

    def __post_init__(self) -> None:
        for name in ("split", "window"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        split, window = self.split, self.window
        valid = len(split) == 3 and min(split) >= 0 and split[1] >= 1
        require(valid, "split", split, "(head, core, tail) block counts with at least 1 in the core")
        require(min(window, default=0) >= 1, "window", window, "at least 1 token along each axis")
        require(1 <= self.num_latents <= MAX_SETTING, "num_latents", self.num_latents, "at least 1")

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


def cell_of(patch: Shape, window: Shape) -> Shape:
    return tuple(p * side for p, side in zip(patch, window, strict=True))


def nearest(length: int, step: int) -> list[int]:
    """The multiples of `step` beside a length, one where it is a multiple itself."""
    return sorted({max(step, length // step * step), max(step, -(-length // step) * step)})


def check_size(size: Sequence[int], cell: Sequence[int]) -> None:
    """Raises ValueError, naming the nearest sizes, for a size that is not a multiple of `cell` along each axis."""
    require(len(size) == len(cell), "sample_size", tuple(size), f"{len(cell)} numbers, as many as patch_size has")
    if any(length < step or length % step for length, step in zip(size, cell, strict=True)):
        near = [nearest(length, step) for length, step in zip(size, cell, strict=True)]
        valid = " × ".join(" or ".join(map(str, choices)) for choices in near)
        multiple = "×".join(map(str, cell))
        require(False, "sample_size", tuple(size), f"a multiple of {multiple} (nearest valid: {valid})")
