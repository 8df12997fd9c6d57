"""Low-rank changes (LoRA, Hu et al. 2021) of the linear layers in an elastified transformer's blocks.

They are part of `transformer.elastic`, beside Read and Write: y = W·x + B·A·x, added by a hook on the layer. So the
original weights stay as they are and under their names, they may be quantised, and other LoRAs go on working; inside
`original()` the changes are off.
"""

import math
import re

import torch
from torch import Tensor, nn

from elit.compat import LORA_WEIGHT, WRAPPED_LAYER
from elit.elastic.context import bypassed
from elit.elastic.families import all_blocks, family_of
from elit.elastic.families.family import Model


class LowRank(nn.Module):
    """B·A·x for x (..., in): A (r, in) random, B (out, r) zero, so that nothing changes at first."""

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x.to(self.down.weight.dtype)))

    def add(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """The hook on a linear layer."""
        return None if bypassed.get() else output + self(args[0]).to(output.dtype)


def add_low_rank(transformer: Model, rank: int, *, seed: int = 0) -> None:
    """Puts changes of rank `rank` on the linear layers of all blocks but their modulations.

    Blocks of head and tail have them too: behind Write they learn what is missing at a low budget.
    """
    changes = nn.ModuleDict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, layer in linear_layers(transformer).items():
            change = LowRank(layer.in_features, layer.out_features, rank)
            changes[name.replace(".", "-")] = change
            layer.register_forward_hook(change.add)
    some = transformer.elastic.latents
    transformer.elastic.low_rank = changes.to(some.device, some.dtype)


def linear_layers(transformer: Model) -> dict[str, nn.Linear]:
    """The linear layers of a transformer's blocks by name, those left out that a sample passes once (modulations)."""
    blocks, family = set(all_blocks(transformer)), family_of(transformer)
    modulation = [pattern for pattern, stream in family.streams if stream == "sample"]
    layers: dict[str, nn.Linear] = {}
    for block_name, block in transformer.named_modules():
        if block not in blocks:
            continue
        for name, module in block.named_modules(prefix=block_name):
            known = name.replace(WRAPPED_LAYER, ".")
            modulates = any(re.search(pattern, known) for pattern in modulation)
            if isinstance(module, nn.Linear) and LORA_WEIGHT not in name and not modulates:
                layers[known] = module
    return layers
