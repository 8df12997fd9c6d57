"""Closed-form cost of a network at a budget: matrix products only, a multiply-add is 2, attention 4·L²·d.

Equal to torch's FlopCounterMode on the real network (under the math attention backend) and to the paper's
figures (section 5): training = 3 × forward × batch. Blocks say their own, a network its Read and Write.
"""

from collections.abc import Sequence
from math import prod
from typing import cast

import torch

from elit.budgets import Budget, resolve_budget
from elit.models.layers import weights_of
from elit.models.presets import create_model
from elit.models.sizes import as_size
from elit.models.transformer import Transformer
from elit.models.windows import windows_of

CPU = torch.device("cpu")


def meta_model(name: str, sample_size: int | Sequence[int] | None = None) -> Transformer:
    """A preset without weights in memory."""
    with torch.device("meta"):
        return create_model(name, sample_size=sample_size)


def count_flops(
    model_or_name: Transformer | str, *, sample_size: int | Sequence[int] | None = None, budget: Budget = None
) -> int:
    """Floating-point operations of one forward of one sample, for a text-conditional network of text_length tokens.

    model_or_name: a network, or the name of a preset. sample_size: default the network's own; a named ELIT preset
    takes the paper's window for that size, an existing network keeps its own. budget: as in the network's forward.

    Raises ValueError for an unknown name, a size that does not divide, a budget that is not valid, or another network.
    """
    model = meta_model(model_or_name, sample_size) if isinstance(model_or_name, str) else model_or_name
    if not isinstance(model, Transformer):
        raise ValueError(
            f"model_or_name must be a network of this library or the name of a preset, got a {type(model).__name__}; "
            "elit.elastic.cost.count_block_flops counts the blocks of an elastified one"
        )
    size = model.sample_size if sample_size is None else as_size(sample_size)
    grid = model.token_grid(size)
    tokens = prod(grid)
    head, core, tail = model.stages()
    total = 2 * tokens * weights_of(model.patch_embed) + model.conditioning_flops() + model.stage_flops(head, tokens)
    if model.spec is None:
        total += model.stage_flops(core, tokens)
    else:
        num_latents = cast(int, resolve_budget(budget, model.budgets))
        windows = windows_of(grid, model.window(size), model.budget_step, CPU)
        kept = zip(windows.shapes, windows.latents(num_latents), strict=True)
        total += model.interface_flops(windows, num_latents)
        total += model.stage_flops(core, sum(count * j for (_, count), j in kept))
    final = weights_of(model.final.modulation.linear) + tokens * weights_of(model.final.linear)
    total += model.stage_flops(tail, tokens) + 2 * final
    if hasattr(model, "elastic_record"):  # a baseline of this library that was given a dial
        return total + model.added_flops(size, budget)
    resolve_budget(budget, model.budgets)
    return total


def shared_flops(model: Transformer, *, sample_size: int | Sequence[int] | None = None) -> int:
    """FLOPs that branches which differ in the budget alone share: all before Read."""
    size = model.sample_size if sample_size is None else as_size(sample_size)
    return model.shared_flops(prod(model.token_grid(size))) if model.spec else 0


def training_tflops(model: Transformer, batch_size: int, budgets: Sequence[Budget]) -> float:
    """TFLOPs of an iteration, 3 × forward × batch, mean over the budgets drawn."""
    costs = [count_flops(model, budget=budget) for budget in budgets]
    return 3 * batch_size * sum(costs) / len(costs) / 1e12
