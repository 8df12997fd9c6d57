"""Looking at what Read reads; costs nothing while nobody looks."""

import torch
from torch import Tensor

from elit.budgets import Budget
from elit.models.conditioning import Condition
from elit.models.layers import unpatchify
from elit.models.transformer import Transformer


def read_attention(model: Transformer, x: Tensor, t: Tensor, y: Condition, budget: Budget = None) -> Tensor:
    """How much latent j reads from each token of its own window, mean over heads: (B, J̃, *token grid).

    Arguments as in the model's forward. Every window's weights sum to 1 (paper Figures 2 and 12).
    Raises ValueError for a baseline, which reads nothing.
    """
    if model.latent_interface is None:
        raise ValueError("model: a baseline has no Read to look at; give an ELIT model")
    maps: list[Tensor] = []
    reader = model.latent_interface.reader
    hook = reader.register_forward_pre_hook(lambda _, inputs: maps.append(reader.attention_map(*inputs)))
    try:
        with torch.no_grad():
            model(x, t, y, budget)
    finally:
        hook.remove()
    weights = maps[0].mean(1)  # (B·G, J̃, n)
    grid = model.token_grid(x.shape[2:])
    tokens = weights.unflatten(0, (len(x), -1)).transpose(2, 3).flatten(1, 2)  # (B, N, J̃)
    return unpatchify(tokens, grid, (1,) * len(grid), model.window(x.shape[2:]))
