"""Closed-form cost of an elastified transformer's blocks: a multiply-add is 2, attention 4·d per pair of query and key.

N image tokens, K kept ones, L text tokens, n tokens of a window, J̃ of them kept, d width.
"""

import re
from collections.abc import Iterator, Sequence
from math import prod

from torch import nn

from elit.compat import WRAPPED_LAYER
from elit.elastic.families import all_blocks, family_of
from elit.elastic.families.family import Model
from elit.models.windows import Windows


def linear_layers(transformer: Model) -> Iterator[tuple[int, str, nn.Linear, str]]:
    """Linear layers of the blocks: number of the block, name in the transformer, layer, and what it runs over."""
    numbers, streams = {block: i for i, block in enumerate(all_blocks(transformer))}, family_of(transformer).streams
    for block_name, block in transformer.named_modules():
        if block in numbers:
            for name, layer in block.named_modules(prefix=block_name):
                if isinstance(layer, nn.Linear):
                    known = f"{name}.".replace(WRAPPED_LAYER, ".")[:-1]
                    stream = next((to for pattern, to in streams if re.search(pattern, known)), "image")
                    yield numbers[block], known, layer, stream


def count_block_flops(
    transformer: Model,
    *,
    tokens: Sequence[Sequence[int]],
    text_tokens: int = 0,
    budget: int | None = None,
    interface: bool = True,
) -> int:
    """FLOPs of all blocks, Read and Write in one forward of one sample; embedders and output layers are left out."""
    family, record = family_of(transformer), transformer.elastic_record
    windows: list[tuple[int, int, int]] = []  # of each shape: how many, n, J̃
    for grid in tokens:
        cut = Windows(tuple(grid), record.window)
        latents = cut.latents(prod(record.window) if budget is None else budget)
        windows += [(number, prod(shape), j) for (shape, number), j in zip(cut.shapes, latents, strict=True)]
    image = sum(count * n for count, n, _ in windows)
    kept = sum(count * j for count, _, j in windows)
    width, _ = family.sizes(transformer)
    runs_over, total = [], 0
    for number, block in enumerate(all_blocks(transformer)):
        core = interface and record.read_after <= number < record.write_after
        runs_over.append(kept if core else image)
        total += 4 * width * family.attention(block, runs_over[-1], text_tokens)
    for number, _, layer, stream in linear_layers(transformer):
        own = runs_over[number]
        rows = {"image": own, "text": text_tokens, "both": own + text_tokens, "sample": 1, "other": 0}[stream]
        total += 2 * rows * layer.in_features * layer.out_features
    if not interface:
        return total
    # Read: queries, output and MLP (4 K·d²), keys and values (2 N·d²); Write: the same with N and K exchanged.
    linear = 6 * (image + kept) * width**2 + len(windows) * transformer.elastic.reader.modulation.linear.weight.numel()
    # Each latent attends to its window's tokens, and each token to its window's latents.
    pairs = sum(count * n * j for count, n, j in windows)
    spread = sum(count * n * j for count, n, j in windows if j < n) if transformer.elastic.carry else 0
    return total + 2 * linear + 8 * width * pairs + 4 * width * spread
