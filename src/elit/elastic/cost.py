"""Closed-form cost of an elastified transformer's blocks: a multiply-add is 2, attention 4·d per pair of query and key.

B = 1, N image tokens, K carried ones, L text tokens, n tokens of a window, J̃ of them carried, d width.
"""

import re
from collections.abc import Sequence
from math import prod
from typing import Any

from torch import nn

from elit.elastic.families import Family, all_blocks, family_of
from elit.models.layout import parts_of


def count_block_flops(
    transformer: Any,
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
    carried = sum(count * j for count, _, j in windows)
    total = _interface(transformer, windows) if interface else 0
    names = {module: name for name, module in transformer.named_modules()}
    for number, block in enumerate(all_blocks(transformer)):
        core = interface and record.read_after <= number < record.write_after
        total += _block(
            family, names[block], block, carried if core else image, text_tokens, family.sizes(transformer)[0]
        )
    return total


def _windows(
    tokens: int | Sequence[Sequence[int]], window: tuple[int, ...], budget: int | Sequence[int] | None
) -> list[tuple[int, int, int]]:
    """Windows of each shape: how many, n, J̃."""
    full = prod(window)
    if isinstance(tokens, int):
        if tokens % full:
            raise ValueError(f"tokens={tokens}: windows of {full} do not make up that many; give the token grid")
        return [(tokens // full, full, full if budget is None else int(budget))]  # pyrefly: ignore[bad-argument-type]
    counts = [full if budget is None else budget] * len(tokens) if isinstance(budget, int | None) else budget
    return [
        (part.windows, part.tokens, part.num_latents)
        for grid, count in zip(tokens, counts, strict=True)
        for part in parts_of(tuple(grid), window, count)
    ]


def _block(family: Family, name: str, block: nn.Module, image: int, text: int, width: int) -> int:
    runs_over = {"image": image, "text": text, "both": image + text, "sample": 1, "other": 0}
    total = 4 * width * family.attention(block, image, text)
    for part, layer in block.named_modules():
        if isinstance(layer, nn.Linear):
            stream = next((to for piece, to in family.streams if re.search(piece, f"{name}.{part}")), "image")
            total += 2 * runs_over[stream] * layer.weight.numel()
    return total


def _interface(transformer: Any, windows: list[tuple[int, int, int]]) -> int:
    """Read: queries, output and MLP (4 K·d²), keys and values (2 N·d²); Write: the same with N and K exchanged."""
    width, _ = family_of(transformer).sizes(transformer)
    modulation = transformer.elastic.reader.modulation.linear.weight.numel()
    tokens, carried = (sum(window[0] * window[i] for window in windows) for i in (1, 2))
    # Each latent looks at its window's tokens, and each token at its window's latents.
    pairs = sum(count * n * j for count, n, j in windows)
    spread = sum(count * n * j for count, n, j in windows if j < n) if transformer.elastic.carry else 0
    linear = (6 * tokens + 6 * carried) * width**2 + modulation
    return 2 * linear + 2 * 4 * width * pairs + 2 * 2 * width * spread
