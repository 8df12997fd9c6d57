"""Closed-form cost of an elastified transformer's blocks: a multiply-add is 2, attention 4·d per pair of query and key.

B = 1, N image tokens, K carried ones, L text tokens, n tokens of a window, J̃ of them carried, d width.
"""

import re
from math import prod
from typing import Any

from torch import nn

from elit.elastic.families import Family, all_blocks, family_of


def count_block_flops(
    transformer: Any, *, tokens: int, text_tokens: int = 0, kept: int | None = None, interface: bool = True
) -> int:
    """FLOPs of all blocks, Read and Write in one forward of one sample; embedders and output layers are left out.

    tokens: N. kept: J̃, default all. interface=False: the original model's blocks.
    """
    family, record = family_of(transformer), transformer.elastic_record
    n = prod(record.window)
    carried = tokens if kept is None else tokens // n * kept
    total = _interface(transformer, tokens, carried, n) if interface else 0
    names = {module: name for name, module in transformer.named_modules()}
    for number, block in enumerate(all_blocks(transformer)):
        core = interface and record.read_after <= number < record.write_after
        total += _block(
            family, names[block], block, carried if core else tokens, text_tokens, family.sizes(transformer)[0]
        )
    return total


def _block(family: Family, name: str, block: nn.Module, image: int, text: int, width: int) -> int:
    runs_over = {"image": image, "text": text, "both": image + text, "sample": 1}
    total = 4 * width * family.attention(block, image, text)
    for part, layer in block.named_modules():
        if isinstance(layer, nn.Linear):
            stream = next((to for piece, to in family.streams if re.search(piece, f"{name}.{part}")), "image")
            total += 2 * runs_over[stream] * layer.weight.numel()
    return total


def _interface(transformer: Any, tokens: int, carried: int, n: int) -> int:
    """Read: queries, output and MLP (4 K·d²), keys and values (2 N·d²); Write: the same with N and K exchanged."""
    width, _ = family_of(transformer).sizes(transformer)
    modulation = transformer.elastic.reader.modulation.linear.weight.numel()
    pairs = carried * n  # each latent with its window's tokens, and each token with its window's latents
    linear = (6 * tokens + 6 * carried) * width**2 + modulation
    spread = 2 * pairs if transformer.elastic.carry and carried < tokens else 0
    return 2 * linear + (2 * 4 + 2 * (spread > 0) * 2) * width * pairs
