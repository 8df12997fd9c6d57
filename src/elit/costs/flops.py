"""Closed-form cost of a network at a budget: matrix products only, a multiply-add is 2, attention 4·L²·d.

Equal to torch's FlopCounterMode on the real network (under the math attention backend) and to the paper's
figures (section 5): training = 3 × forward × batch.

N spatial tokens, n of a group, J̃ latents of it kept, K in all, d width, L tokens of any sequence, M of a text.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from elit.budgets import Budget, resolve_budget
from elit.costs.timing import timed
from elit.models.conditioning import CHARACTERS, CharacterEncoder, TimeEmbedding
from elit.models.hdit import MERGED, HDiT, merged_blocks
from elit.models.interface import InterfaceSpec
from elit.models.layers import token_grid
from elit.models.mmdit import MMDiT
from elit.models.presets import model_config
from elit.models.sit import SiT
from elit.models.transformer import Transformer, as_patch, as_size
from elit.models.uvit import UViT, skip_pairs
from elit.models.windows import Part, parts_of


def count_flops(
    model_or_name: Transformer | str, *, sample_size: int | Sequence[int] | None = None, budget: Budget = None
) -> int:
    """Floating-point operations of one forward of one sample, for a text-conditional network of text_length tokens.

    model_or_name: a network, or the name of a preset. sample_size: default the network's own; a named ELIT preset
    takes the paper's window for that size, an existing network keeps its own. budget: as in the network's forward.

    Raises ValueError for an unknown name, a size that does not divide, a budget that is not valid, or another network.
    """
    config: Any
    if hasattr(model_or_name, "elastic_record") and not isinstance(model_or_name, Transformer):
        raise ValueError(
            f"model_or_name: an elastified {type(model_or_name).__name__}, whose blocks, Read and Write are counted by "
            "elit.elastic.cost.count_block_flops(transformer, tokens=…, budget=…)"
        )
    if not isinstance(model_or_name, Transformer | str):
        raise ValueError(
            f"model_or_name: a {type(model_or_name).__name__}; give a network of this library or the name of a preset"
        )
    if isinstance(model_or_name, str):
        network, config = model_config(model_or_name, sample_size=sample_size)
    else:
        network, config = type(model_or_name), model_or_name.config
    size = as_size(config["sample_size"] if sample_size is None else sample_size)
    if hasattr(model_or_name, "elastic_record"):  # a baseline of this library that was given a dial
        model: Any = model_or_name
        return _config_flops(network, config, size, None) + model.added_flops(size, budget)
    return _config_flops(network, config, size, budget)


def shared_flops(model: Transformer, *, sample_size: int | Sequence[int] | None = None) -> int:
    """What branches that differ in the budget alone share: all before Read, and of a SiT Read too."""
    network, config = type(model), model.config
    size = as_size(config["sample_size"] if sample_size is None else sample_size)
    if model.spec is None:
        return 0
    d, tokens = config["hidden_size"], math.prod(model.token_grid(size))
    embed = 2 * tokens * config["in_channels"] * math.prod(model.patch_size) * d
    head = _stage_flops(network, config, model.spec, range(model.spec.split[0]), tokens)
    read = sit_read_flops(tokens, math.prod(model.spec.window), d) if network is SiT else 0
    return embed + _conditioning_flops(network, config) + head + read


def _config_flops(network: type[Transformer], config: Mapping[str, Any], size: Sequence[int], budget: Budget) -> int:
    d, depth = config["hidden_size"], config["depth"]
    patch = as_patch(config["patch_size"], config["sample_size"])
    spec = InterfaceSpec.from_config(config["interface"]) if config.get("interface") else None
    grid = token_grid(size, patch, network.whole_windows(spec, len(size)))
    tokens = math.prod(grid)
    patch_features = config["in_channels"] * math.prod(patch)
    head, core, _ = spec.split if spec else (0, depth, 0)

    total = 2 * tokens * patch_features * d  # patch embedding
    total += _conditioning_flops(network, config)
    total += _stage_flops(network, config, spec, range(head), tokens)
    if spec:
        step = network.budget_step
        num_latents = cast(int, resolve_budget(budget, range(step, spec.num_latents + 1, step)))
        parts = parts_of(grid, spec.window, num_latents, step)
        n = math.prod(spec.window)
        total += sit_interface_flops(tokens, n, d) if network is SiT else interface_flops(parts, d)
        latents = sum(part.windows * part.num_latents for part in parts)
        total += _stage_flops(network, config, spec, range(head, head + core), latents)
    else:
        resolve_budget(budget, ())
        total += _stage_flops(network, config, spec, range(core), tokens)
    total += _stage_flops(network, config, spec, range(head + core, depth), tokens)
    total += 4 * d * d + 2 * tokens * d * patch_features  # final modulation and linear
    return total


def _stage_flops(
    network: type[Transformer], config: Mapping[str, Any], spec: InterfaceSpec | None, blocks: range, length: int
) -> int:
    """A run of blocks over `length` tokens or latents; what each backbone adds to DiT's blocks is here."""
    d, depth, ratio = config["hidden_size"], config["depth"], config.get("mlp_ratio", 4.0)
    if network is MMDiT:
        joint = [_joint_block_flops(length, config["text_length"], d, ratio, last=i == depth - 1) for i in blocks]
        return sum(joint)
    plain = _block_flops(length, d, d, ratio)
    if network is UViT:
        skips = set(skip_pairs(depth, spec.split if spec else None).values()) & set(blocks)
        return len(blocks) * plain + len(skips) * 4 * length * d * d
    if network is HDiT and (wide := set(merged_blocks(depth)) & set(blocks)):
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


def _conditioning_flops(network: type[Transformer], config: Mapping[str, Any]) -> int:
    d = config["hidden_size"]
    total = 2 * (TimeEmbedding.frequencies * d + d * d)  # timestep MLP
    if network is MMDiT:
        features, length = config["text_features"], config["text_length"]
        total += 2 * length * features * d + 2 * config["pooled_features"] * d
        if config["text_encoder"] == CHARACTERS:
            total += CharacterEncoder.depth * (24 * length * features**2 + 4 * length**2 * features)
    return total


def interface_flops(parts: Sequence[Part], d: int) -> int:
    """Read and Write of the windows of a grid, by shape, width d."""
    total = 12 * d**2  # Read's modulation
    for windows, shape, num_latents in parts:
        tokens, latents, pairs = (
            windows * math.prod(shape),
            windows * num_latents,
            windows * math.prod(shape) * num_latents,
        )
        # Read: queries once a sample, keys and values, attention inside groups, output, MLP.
        total += 2 * num_latents * d**2 + 4 * tokens * d**2 + 4 * pairs * d + 6 * latents * d**2
        # Write: queries, keys and values, attention inside groups, output, MLP.
        total += 2 * tokens * d**2 + 4 * latents * d**2 + 4 * pairs * d + 6 * tokens * d**2
    return total


def sit_interface_flops(tokens: int, n: int, d: int) -> int:
    """Read and Write of ELIT-SiT, the same at every budget: as many latents as tokens, all of them read and written."""
    write = 6 * tokens * d**2 + 4 * tokens * n * d + 6 * tokens * d**2
    return sit_read_flops(tokens, n, d) + write


def sit_read_flops(tokens: int, n: int, d: int) -> int:
    return 12 * d**2 + 2 * n * d**2 + 4 * tokens * d**2 + 4 * tokens * n * d + 6 * tokens * d**2


def measure_ms(
    model: Transformer,
    *,
    sample_size: int | Sequence[int] | None = None,
    budget: Budget = None,
    batch_size: int = 1,
    repeats: int = 5,
) -> float:
    """Milliseconds of a forward of one sample: the median of `repeats` batches, over `batch_size`."""
    size = as_size(model.config.sample_size if sample_size is None else sample_size)
    x = torch.randn(batch_size, model.config.in_channels, *size, device=model.device, dtype=model.dtype)
    t = torch.full((batch_size,), 0.5, device=model.device)
    y = model.example_condition(batch_size).to(model.device)

    with torch.no_grad():
        seconds = [timed(lambda: model(x, t, y, budget), model.device)[1] for _ in range(repeats + 1)]
    return 1e3 * statistics.median(seconds[1:]) / batch_size  # the first one warms up
