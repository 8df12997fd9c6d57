"""The attention of Read; costs nothing while it is not recorded."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from elit.budgets import Budget
from elit.models.conditioning import Condition
from elit.models.interface import LatentInterface
from elit.models.layers import unpatchify
from elit.models.transformer import Transformer


def read_attention(model: Transformer, x: Tensor, t: Tensor, y: Condition, budget: Budget = None) -> Tensor:
    """Attention of latent j to each token of its own window, mean over heads: (B, J̃, *token grid).

    Arguments as in the model's forward. Every window's weights sum to 1 (paper Figures 2 and 12).
    Raises ValueError for a baseline, and for windows of several sizes.
    """
    with recorded_attention(model) as maps, torch.no_grad():
        model(x, t, y, budget)
    weights = maps[0].mean(1)  # (B·G, J̃, n)
    tokens = weights.unflatten(0, (len(x), -1)).transpose(2, 3).flatten(1, 2)  # (B, N, J̃)
    return as_grid(model, tokens, x.shape[2:])


@contextmanager
def recorded_attention(model: Transformer) -> Iterator[list[Tensor]]:
    """A list to which every forward in the block adds Read's attention, (B·G, H, J̃, n).

    Raises ValueError for a baseline.
    """
    reader = interface_of(model).reader
    maps: list[Tensor] = []

    def record(_: object, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        if not isinstance(inputs[1], Tensor):
            raise ValueError("cannot map attention over windows of several sizes: give a size that divides into them")
        maps.append(reader.attention_map(*inputs))

    hook = reader.register_forward_pre_hook(record)
    try:
        yield maps
    finally:
        hook.remove()


def as_grid(model: Transformer, tokens: Tensor, size: Sequence[int]) -> Tensor:
    """Group-major tokens (B, N, k) of samples of `size` in raster order: (B, k, *token grid)."""
    grid = model.token_grid(size)
    return unpatchify(tokens, grid, (1,) * len(grid), model.window(size))


def interface_of(model: Transformer) -> LatentInterface:
    """Raises ValueError for a baseline."""
    if model.latent_interface is None:
        raise ValueError("cannot inspect a baseline, which has no Read: give an ELIT model")
    return model.latent_interface
