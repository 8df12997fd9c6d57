"""How many parameters a network has, in closed form: of its settings alone, so that nothing is built to say it.

d width, h head width, n tokens of a window, J latents of one.
"""

import math
from collections.abc import Mapping
from typing import Any

from elit.models.layout import (
    CHARACTER_BLOCKS,
    CHARACTERS,
    LATENT_POSITIONS,
    MERGED,
    TIME_FREQUENCIES,
    InterfaceSpec,
    Kind,
    as_patch,
    merged_blocks,
    skip_pairs,
)


def count_parameters(kind: Kind, config: Mapping[str, Any]) -> int:
    """Of a network of this kind. config: what `elit.models.presets.model_config` gives, or a network's own."""
    d = config["hidden_size"]
    spec = InterfaceSpec.from_config(config["interface"]) if config.get("interface") else None
    patch_features = config["in_channels"] * math.prod(as_patch(config["patch_size"], config["sample_size"]))
    total = _linear(patch_features, d) + _linear(d, 2 * d) + _linear(d, patch_features)  # embedding, final layer
    total += _linear(TIME_FREQUENCIES, d) + _linear(d, d)
    total += _text(config) if kind.takes_text else (config["num_classes"] + 1) * d
    total += _blocks(kind, config, spec)
    if spec is not None:
        head_width = d // config["num_heads"]
        total += _sit_interface(d, spec) if kind.name == "SiT" else _interface(d, head_width, spec)
    return total


def _blocks(kind: Kind, config: Mapping[str, Any], spec: InterfaceSpec | None) -> int:
    """Of all blocks; what each backbone adds to DiT's is here."""
    d, depth, ratio = config["hidden_size"], config["depth"], config["mlp_ratio"]
    head_width = d // config["num_heads"]
    plain = _block(d, head_width, ratio)
    if kind.name == "MMDiT":
        last = plain + _linear(d, 2 * d) + _linear(d, 2 * d) + head_width  # the text's modulation, keys and values
        return 2 * (depth - 1) * plain + last
    if kind.name == "UViT":
        return depth * plain + len(skip_pairs(depth, spec.split if spec else None)) * _linear(2 * d, d)
    if kind.name == "HDiT":
        wide = len(merged_blocks(depth))
        merge_and_split = _linear(MERGED * d, 2 * d) + _linear(2 * d, MERGED * d) + 1
        return (depth - wide) * plain + wide * _block(2 * d, head_width, ratio, condition=d) + merge_and_split
    return depth * (plain - (2 * head_width if kind.name == "SiT" else 0))  # SiT's blocks have no QK-norm


def _block(d: int, head_width: int, mlp_ratio: float, condition: int | None = None) -> int:
    return _linear(condition or d, 6 * d) + _attention(d, head_width) + _mlp(d, int(mlp_ratio * d))


def _attention(d: int, head_width: int) -> int:
    """Queries, keys, values and output, and the scales of QK-norm; of self-attention and of cross-attention."""
    return _linear(d, 3 * d) + _linear(d, d) + 2 * head_width


def _mlp(d: int, hidden: int) -> int:
    return _linear(d, hidden) + _linear(hidden, d)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _interface(d: int, head_width: int, spec: InterfaceSpec) -> int:
    tables = (math.prod(spec.window) + spec.num_latents) * d
    norms = (1 + 3) * 2 * d  # one of Read's, three of Write's, each with scale and shift
    return tables + norms + _linear(d, 6 * d) + 2 * (_attention(d, head_width) + _mlp(d, d))


def _sit_interface(d: int, spec: InterfaceSpec) -> int:
    tables = (LATENT_POSITIONS + 3 * spec.num_latents) * d
    return tables + _linear(d, 6 * d) + 2 * (_attention(d, d) + 2 * d * d)  # norms over the width, MLPs without bias


def _text(config: Mapping[str, Any]) -> int:
    """The text's projection, its pooled vector's, the vector that stands for no text, and the built-in encoder."""
    d, features, pooled = config["hidden_size"], config["text_features"], config["pooled_features"]
    total = features + _linear(features, d) + (_linear(pooled, d) if pooled else 0) + d
    if config["text_encoder"] == CHARACTERS:
        heads = 4 if features % 8 == 0 else 1
        block = 2 * 2 * features + _attention(features, features // heads) + _mlp(features, 4 * features)
        total += (1 + 256) * features + CHARACTER_BLOCKS * block
    return total
