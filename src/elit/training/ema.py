"""The average of the weights, which is what a run saves: sharded as they are, on their device or on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from elit.compat import copy_all, lerp_all


class AveragedWeights:
    """Exponential moving average of a network's trained parameters, as diffusers' EMAModel has it.

    Its decay at step n is min(decay, n / (9 + n)), 0 at the first. Unlike there, each process averages its own shard
    and nothing else, and with `on_cpu` the copies travel while the next step computes.
    """

    def __init__(self, network: nn.Module, decay: float, *, on_cpu: bool = False):
        self.decay, self.steps = decay, 0
        trained = {name: weight.detach() for name, weight in network.named_parameters() if weight.requires_grad}
        place = "cpu" if on_cpu else next(network.parameters()).device
        self.weights = {name: weight.to(place, copy=True) for name, weight in trained.items()}
        """The average by name, DTensors where the network is sharded."""
        self._staged: list[Tensor] = []
        """On the CPU: the weights of the last step, on their way."""
        self._copied: torch.Event | None = None
        self._share = 0.0  # of the staged weights in the average; 0 = they are in it
        if on_cpu:
            pinned = next(network.parameters()).device.type != "cpu"
            self._staged = [torch.empty_like(weight, pin_memory=pinned) for weight in self._shards()]

    @torch.no_grad()
    def step(self, network: nn.Module) -> None:
        """Moves towards the network's weights of now."""
        self.settle()
        self.steps += 1
        decay = min(self.decay, self.steps / (9 + self.steps)) if self.steps > 1 else 0.0
        now = _shards_of(network)
        if not self._staged:
            lerp_all(self._shards(), now, 1 - decay)
            return
        copy_all(self._staged, now, non_blocking=True)
        self._share = 1 - decay
        if now[0].device.type != "cpu":
            self._copied = torch.Event(now[0].device)
            self._copied.record()

    @torch.no_grad()
    def settle(self) -> None:
        """Takes in what a step on the CPU has copied; call it before `weights` is read."""
        if not self._share:
            return
        if self._copied is not None:
            self._copied.synchronize()
        lerp_all(self._shards(), self._staged, self._share)
        self._share = 0.0

    @contextmanager
    @torch.no_grad()
    def in_place_of(self, network: nn.Module) -> Iterator[None]:
        """Lends the average to the network, for a preview.

        FSDP2 keeps the root's weights gathered after a forward without a backward; so they are given up on both sides.
        """
        self.settle()
        sharded = [module for module in network.modules() if isinstance(module, FSDPModule)]
        for module in sharded:
            module.reshard()
        shards = _shards_of(network)
        own_weights = [shard.clone() for shard in shards]
        copy_all(shards, self._shards())
        try:
            yield
        finally:
            for module in sharded:
                module.reshard()
            copy_all(shards, own_weights)

    def whole(self) -> dict[str, Tensor]:
        """The average on the CPU, no longer sharded; every process must call it."""
        self.settle()
        return {
            name: (weight.full_tensor() if isinstance(weight, DTensor) else weight).cpu()
            for name, weight in self.weights.items()
        }

    def _shards(self) -> list[Tensor]:
        return [_own(weight) for weight in self.weights.values()]


def _own(weight: Tensor) -> Tensor:
    """This process's part."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _shards_of(network: nn.Module) -> list[Tensor]:
    return [_own(weight.detach()) for weight in network.parameters() if weight.requires_grad]
