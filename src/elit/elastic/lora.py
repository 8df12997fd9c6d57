"""Low-rank adapters (LoRA, by peft) on the blocks of an elastified network of this library, while it is distilled.

They end up in the weights: W + B·A. What is saved, loaded, compiled and counted is an elastified network like any
other, and only training needs peft.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from elit.compat import LORA_WEIGHT
from elit.elastic.runtime import original

LAYERS = r"blocks\.\d+\.(attention\.(qkv|proj)|mlp\.fc[12])"
"""Of all blocks, those of head and tail too: behind Write they learn what is missing at a low budget."""


class Adapters:
    """Adapters of rank `rank` on a network's blocks; they start at zero. Raises ValueError as `check_adapters`."""

    def __init__(self, network: Any, *, rank: int, seed: int):
        check_adapters(rank)
        from peft import LoraConfig, LoraModel

        self.network = network
        self.trainable = [weight for weight in network.parameters() if weight.requires_grad]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.lora = LoraModel(network, LoraConfig(r=rank, lora_alpha=rank, target_modules=LAYERS), "distil")
        network.elastic.requires_grad_()  # peft has frozen all but its own

    def parameters(self) -> list[nn.Parameter]:
        return [weight for name, weight in self.network.named_parameters() if LORA_WEIGHT in name]

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside the block the network is what it was before: without adapters, without its interface."""
        self.lora.disable_adapter_layers()
        try:
            with original():
                yield
        finally:
            self.lora.enable_adapter_layers()

    def merge(self) -> None:
        """Adds them to the weights; their layers are ordinary ones again, and as trainable as before."""
        self.lora.merge_and_unload()
        for weight in self.trainable:
            weight.requires_grad_()


def check_adapters(rank: int) -> None:
    """Raises ValueError where peft is missing or the rank is none."""
    if rank < 1:
        raise ValueError(f"lora_rank={rank}: give at least 1")
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ValueError(f"weights='lora': needs peft ({error}); pip install 'elit-diffusion[lora]'") from None
