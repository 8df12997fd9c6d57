"""Closed-form cost of a network at a budget: matrix products only, a multiply-add is 2, attention 4·L²·d.

Equal to torch's FlopCounterMode on the real network (under the math attention backend) and to the paper's
figures (section 5): training = 3 × forward × batch.

N spatial tokens, n of a group, J̃ latents of it kept, K in all, d width, L tokens of any sequence, M of a text.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from elit.budgets import Budget, resolve_budget
from elit.models.layout import (
    CHARACTER_BLOCKS,
    CHARACTERS,
    MERGED,
    TIME_FREQUENCIES,
    InterfaceSpec,
    Kind,
    as_patch,
    as_size,
    merged_blocks,
    skip_pairs,
)
from elit.models.presets import model_config
from elit.models.windows import Windows

if TYPE_CHECKING:
    from elit.models.transformer import Transformer


def count_flops(
    model_or_name: "Transformer | str", *, sample_size: int | Sequence[int] | None = None, budget: Budget = None
) -> int:
    """Floating-point operations of one forward of one sample, for a text-conditional network of text_length tokens.

    model_or_name: a network, or the name of a preset. sample_size: default the network's own; a named ELIT preset
    takes the paper's window for that size, an existing network keeps its own. budget: as in the network's forward.

    Raises ValueError for an unknown name, a size that does not divide, a budget that is not valid, or another network.
    """
    config: Any
    own = isinstance(getattr(model_or_name, "kind", None), Kind)
    if hasattr(model_or_name, "elastic_record") and not own:
        raise ValueError(
            f"model_or_name: an elastified {type(model_or_name).__name__}, whose blocks, Read and Write are counted by "
            "elit.elastic.cost.count_block_flops(transformer, tokens=…, budget=…)"
        )
    if isinstance(model_or_name, str):
        kind, config = model_config(model_or_name, sample_size=sample_size)
    elif own:
        kind, config = model_or_name.kind, model_or_name.config
    else:
        raise ValueError(
            f"model_or_name: a {type(model_or_name).__name__}; give a network of this library or the name of a preset"
        )
    size = as_size(config["sample_size"] if sample_size is None else sample_size)
    if hasattr(model_or_name, "elastic_record"):  # a baseline of this library that was given a dial
        model: Any = model_or_name
        return _config_flops(kind, config, size, None) + model.added_flops(size, budget)
    return _config_flops(kind, config, size, budget)


def valid_budgets(kind: Kind, config: Mapping[str, Any]) -> range:
    """What a network of this kind has as `budgets`, ascending; empty for a baseline."""
    spec = config.get("interface")
    return range(kind.budget_step, spec["num_latents"] + 1, kind.budget_step) if spec else range(0)


def shared_flops(model: "Transformer", *, sample_size: int | Sequence[int] | None = None) -> int:
    """FLOPs that branches which differ in the budget alone share: all before Read."""
    kind, config = model.kind, model.config
    size = as_size(config["sample_size"] if sample_size is None else sample_size)
    if model.spec is None:
        return 0
    d, tokens = config["hidden_size"], math.prod(model.token_grid(size))
    embed = 2 * tokens * config["in_channels"] * math.prod(model.patch_size) * d
    head = _stage_flops(kind, config, model.spec, range(model.spec.split[0]), tokens)
    return embed + _conditioning_flops(kind, config) + head


def _config_flops(kind: Kind, config: Mapping[str, Any], size: Sequence[int], budget: Budget) -> int:
    d, depth = config["hidden_size"], config["depth"]
    patch = as_patch(config["patch_size"], config["sample_size"])
    spec = InterfaceSpec.from_config(config["interface"]) if config.get("interface") else None
    grid = kind.token_grid(size, patch, spec)
    tokens = math.prod(grid)
    patch_features = config["in_channels"] * math.prod(patch)
    head, core, _ = spec.split if spec else (0, depth, 0)

    total = 2 * tokens * patch_features * d  # patch embedding
    total += _conditioning_flops(kind, config)
    total += _stage_flops(kind, config, spec, range(head), tokens)
    if spec:
        step = kind.budget_step
        num_latents = cast(int, resolve_budget(budget, range(step, spec.num_latents + 1, step)))
        windows = Windows(grid, spec.window, step)
        n = math.prod(spec.window)
        total += sit_interface_flops(tokens, n, d) if kind.name == "SiT" else interface_flops(windows, num_latents, d)
        latents = sum(count * j for (_, count), j in zip(windows.shapes, windows.latents(num_latents), strict=True))
        total += _stage_flops(kind, config, spec, range(head, head + core), latents)
    else:
        resolve_budget(budget, ())
        total += _stage_flops(kind, config, spec, range(core), tokens)
    total += _stage_flops(kind, config, spec, range(head + core, depth), tokens)
    total += 4 * d * d + 2 * tokens * d * patch_features  # final modulation and linear
    return total


def _stage_flops(kind: Kind, config: Mapping[str, Any], spec: InterfaceSpec | None, blocks: range, length: int) -> int:
    """A run of blocks over `length` tokens or latents; what each backbone adds to DiT's blocks is here."""
    d, depth, ratio = config["hidden_size"], config["depth"], config.get("mlp_ratio", 4.0)
    if kind.name == "MMDiT":
        joint = [_joint_block_flops(length, config["text_length"], d, ratio, last=i == depth - 1) for i in blocks]
        return sum(joint)
    plain = _block_flops(length, d, d, ratio)
    if kind.name == "UViT":
        skips = set(skip_pairs(depth, spec.split if spec else None).values()) & set(blocks)
        return len(blocks) * plain + len(skips) * 4 * length * d * d
    if kind.name == "HDiT" and (wide := set(merged_blocks(depth)) & set(blocks)):
        merged = length // MERGED
        merge_and_split = 2 * 2 * merged * (MERGED * d) * (2 * d)
        wide_block = _block_flops(merged, 2 * d, d, ratio)
        return (len(blocks) - len(wide)) * plain + len(wide) * wide_block + merge_and_split
    return len(blocks) * plain


def _block_flops(length: int, d: int, condition: int, mlp_ratio: float) -> int:
    modulation = 12 * condition * d
    attention = 8 * length * d * d + 4 * length**2 * d
    return modulation + attention + 4 * length * d * int(mlp_ratio * d)


def _joint_block_flops(length: int, text: int, d: int, mlp_ratio: float, *, last: bool) -> int:
    both = length + text
    if last:  # the text gives keys and values, and ends
        modulation = 12 * d * d + 4 * d * d
        attention = 8 * length * d * d + 4 * text * d * d + 4 * length * both * d
        return modulation + attention + 4 * length * d * int(mlp_ratio * d)
    return 24 * d * d + 8 * both * d * d + 4 * both**2 * d + 4 * both * d * int(mlp_ratio * d)


def _conditioning_flops(kind: Kind, config: Mapping[str, Any]) -> int:
    d = config["hidden_size"]
    total = 2 * (TIME_FREQUENCIES * d + d * d)  # timestep MLP
    if kind.name == "MMDiT":
        features, length = config["text_features"], config["text_length"]
        total += 2 * length * features * d + 2 * config["pooled_features"] * d
        if config["text_encoder"] == CHARACTERS:
            total += CHARACTER_BLOCKS * (24 * length * features**2 + 4 * length**2 * features)
    return total


def interface_flops(windows: Windows, budget: int, d: int) -> int:
    """Read and Write of the windows of a grid, width d."""
    total = 0
    for (shape, count), j in zip(windows.shapes, windows.latents(budget), strict=True):
        tokens, latents, pairs = count * math.prod(shape), count * j, count * math.prod(shape) * j
        # Read: modulation, queries once a sample, keys and values, attention in windows, output, MLP.
        total += 12 * d**2 + 2 * j * d**2 + 4 * tokens * d**2 + 4 * pairs * d + 6 * latents * d**2
        # Write: queries, keys and values, attention in windows, output, MLP.
        total += 2 * tokens * d**2 + 4 * latents * d**2 + 4 * pairs * d + 6 * tokens * d**2
    return total


def sit_interface_flops(tokens: int, n: int, d: int) -> int:
    """Read and Write of ELIT-SiT, the same at every budget: as many latents as tokens, all of them read and written."""
    read = 12 * d**2 + 2 * n * d**2 + 4 * tokens * d**2 + 4 * tokens * n * d + 6 * tokens * d**2
    return read + 6 * tokens * d**2 + 4 * tokens * n * d + 6 * tokens * d**2
