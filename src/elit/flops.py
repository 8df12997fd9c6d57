"""Closed-form cost of a network at a budget: matrix products only, a multiply-add is 2, attention 4·L²·d.

Equal to torch's FlopCounterMode on the real network (under the math attention backend) and to the paper's
figures (section 5): training = 3 × forward × batch.

N spatial tokens, n = N / G of a group, J̃ latents kept, K = G·J̃, d width, L tokens of any sequence.
"""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from elit.budgets import Budget, resolve_budget
from elit.models.dit import DiT, as_patch, as_size
from elit.models.interface import InterfaceSpec
from elit.models.layers import ClassConditioning, token_grid
from elit.models.presets import model_config


def count_flops(
    model_or_name: nn.Module | str, *, sample_size: int | Sequence[int] | None = None, budget: Budget = None
) -> int:
    """Floating-point operations of one forward of one sample.

    model_or_name: a network, or the name of a preset. sample_size: default the network's own; a named ELIT preset
    takes the paper's window for that size, an existing network keeps its own. budget: as in the network's forward.

    Raises ValueError for an unknown name, a size that does not divide, or a budget that is not valid.
    """
    config: Any
    if isinstance(model_or_name, str):
        config = model_config(model_or_name, sample_size=sample_size)
    else:
        config = model_or_name.config
    return _config_flops(config, as_size(sample_size or config["sample_size"]), budget)


def _config_flops(config: Mapping[str, Any], size: Sequence[int], budget: Budget) -> int:
    d, depth, ratio = config["hidden_size"], config["depth"], config.get("mlp_ratio", 4.0)
    patch = as_patch(config["patch_size"], config["sample_size"])
    spec = InterfaceSpec.from_config(config["interface"]) if config.get("interface") else None
    tokens = math.prod(token_grid(size, patch, spec.window if spec else None))
    patch_features = config["in_channels"] * math.prod(patch)
    kept = resolve_budget(budget, spec.budgets if spec else ())

    total = 2 * tokens * patch_features * d  # patch embedding
    total += 2 * (ClassConditioning.frequencies * d + d * d)  # timestep MLP
    if spec is None or kept is None:
        total += depth * _block_flops(tokens, d, ratio)
    else:
        head, core, tail = spec.split
        n = math.prod(spec.window)
        total += (head + tail) * _block_flops(tokens, d, ratio)
        total += core * _block_flops(tokens // n * kept, d, ratio)
        total += _interface_flops(tokens, n, kept, d)
    total += 4 * d * d + 2 * tokens * d * patch_features  # final modulation and linear
    return total


def _block_flops(length: int, d: int, mlp_ratio: float) -> int:
    hidden = int(mlp_ratio * d)
    modulation = 12 * d * d
    attention = 8 * length * d * d + 4 * length**2 * d
    return modulation + attention + 4 * length * d * hidden


def _interface_flops(tokens: int, n: int, kept: int, d: int) -> int:
    latents = tokens // n * kept
    # Read: modulation, queries once a sample, keys and values, attention inside groups, output, MLP.
    read = 12 * d**2 + 2 * kept * d**2 + 4 * tokens * d**2 + 4 * latents * n * d + 6 * latents * d**2
    # Write: queries, keys and values, attention inside groups, output, MLP.
    write = 2 * tokens * d**2 + 4 * latents * d**2 + 4 * tokens * kept * d + 6 * tokens * d**2
    return read + write


def measure_ms(
    model: DiT,
    *,
    sample_size: int | Sequence[int] | None = None,
    budget: Budget = None,
    batch_size: int = 1,
    repeats: int = 5,
) -> float:
    """Milliseconds of a forward of one sample: the median of `repeats` batches, over `batch_size`."""
    size = as_size(sample_size or model.config.sample_size)
    x = torch.randn(batch_size, model.config.in_channels, *size, device=model.device, dtype=model.dtype)
    t = torch.full((batch_size,), 0.5, device=model.device)
    y = torch.zeros(batch_size, dtype=torch.int64, device=model.device)

    def forward() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            model(x, t, y, budget)
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    forward()
    return 1e3 * statistics.median(forward() for _ in range(repeats)) / batch_size
