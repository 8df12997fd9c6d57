"""Closed-form cost of an elastified transformer's blocks: a multiply-add is 2, attention 4·d per pair of query and key.

N image tokens, K kept ones, L text tokens, n tokens of a window, J̃ of them kept, d width.
"""

import re
from collections.abc import Sequence
from math import prod

from torch import nn

from elit.config import DistillConfig
from elit.elastic.families import all_blocks, family_of
from elit.elastic.families.family import Model
from elit.elastic.trees import Arguments
from elit.models.windows import Windows


def count_block_flops(
    transformer: Model,
    *,
    tokens: int | Sequence[Sequence[int]],
    text_tokens: int = 0,
    budget: int | Sequence[int] | None = None,
    interface: bool = True,
) -> int:
    """FLOPs of all blocks, Read and Write in one forward of one sample; embedders and output layers are left out.

    tokens: N, or the token grids, ((83, 83),), which is needed where windows do not divide them. budget: J̃ of a
    full window, one for all grids or one a grid; default all. interface=False: the original model's blocks.

    Raises ValueError for a number of tokens that full windows cannot make up.
    """
    family, record = family_of(transformer), transformer.elastic_record
    windows = _windows(tokens, record.window, budget)
    image = sum(count * n for count, n, _ in windows)
    kept = sum(count * j for count, _, j in windows)
    width, _ = family.sizes(transformer)
    names = {module: name for name, module in transformer.named_modules()}
    total = 0
    for number, block in enumerate(all_blocks(transformer)):
        core = interface and record.read_after <= number < record.write_after
        own = kept if core else image
        runs_over = {"image": own, "text": text_tokens, "both": own + text_tokens, "sample": 1, "other": 0}
        total += 4 * width * family.attention(block, own, text_tokens)
        for part, layer in block.named_modules(prefix=names[block]):
            if isinstance(layer, nn.Linear):
                stream = next((to for pattern, to in family.streams if re.search(pattern, part)), "image")
                total += 2 * runs_over[stream] * layer.weight.numel()
    if not interface:
        return total
    # Read: queries, output and MLP (4 K·d²), keys and values (2 N·d²); Write: the same with N and K exchanged.
    linear = 6 * (image + kept) * width**2 + len(windows) * transformer.elastic.reader.modulation.linear.weight.numel()
    # Each latent attends to its window's tokens, and each token to its window's latents.
    pairs = sum(count * n * j for count, n, j in windows)
    spread = sum(count * n * j for count, n, j in windows if j < n) if transformer.elastic.carry else 0
    return total + 2 * linear + 8 * width * pairs + 4 * width * spread


def step_flops(
    transformer: Model, config: DistillConfig, tokens: Sequence[Sequence[int]], text_tokens: int, *, teacher: bool
) -> dict[int | None, int]:
    """FLOPs of a sample's step of distillation at each budget. teacher: the original runs in it too."""
    sizes: Arguments = {"tokens": tokens, "text_tokens": text_tokens}
    passes = 3 if config.weights == "all" else 2  # no gradients of weights that stay
    beside = count_block_flops(transformer, **sizes, interface=False) if teacher else 0
    return {
        count: beside + passes * count_block_flops(transformer, **sizes, budget=count) for count in transformer.budgets
    }


def _windows(
    tokens: int | Sequence[Sequence[int]], window: tuple[int, ...], budget: int | Sequence[int] | None
) -> list[tuple[int, int, int]]:
    """Windows of each shape: how many, n, J̃."""
    full = prod(window)
    if isinstance(tokens, int):
        if tokens % full:
            raise ValueError(f"tokens must be a multiple of {full}, or the token grids, got {tokens}")
        tokens = ((tokens // full, full),)
        window = (1, full)
    budgets = budget if isinstance(budget, Sequence) else [full if budget is None else budget] * len(tokens)
    grids = [(Windows(tuple(grid), window), count) for grid, count in zip(tokens, budgets, strict=True)]
    return [
        (number, prod(shape), j)
        for windows, count in grids
        for (shape, number), j in zip(windows.shapes, windows.latents(count), strict=True)
    ]
