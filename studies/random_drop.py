"""ELIT-DiT with random drop, which the paper compares with its tail drop (Table 4c)."""

from typing import cast

import torch
from torch import Tensor

from elit.models.dit import DiT
from elit.models.interface import LatentInterface
from elit.models.layers import Rope
from elit.models.windows import Windows


class RandomDropInterface(LatentInterface):
    """Keeps a random set of the latents, in their order, instead of the first ones."""

    slots: Tensor

    def read(self, s: Tensor, c: Tensor, windows: Windows, budget: int) -> Tensor:
        self.slots = torch.randperm(len(self.latents))[:budget].sort().values.to(s.device)
        (tokens,) = windows.groups(s)
        return self.reader(self.latents[self.slots], tokens + self.position, c)


class RandomDropDiT(DiT):
    """ELIT-DiT with random drop; latents keep the positions they have at full budget."""

    def build(self) -> None:
        super().build()
        assert self.latent_interface is not None
        self.latent_interface.__class__ = RandomDropInterface

    def rope(self, windows: Windows, budget: int | None = None) -> Rope:
        if budget is None:
            return super().rope(windows)
        interface = cast(RandomDropInterface, self.latent_interface)
        every = len(interface.latents)
        whole = super().rope(windows, every)  # of all latents, group by group
        return Rope(*(table.unflatten(0, (-1, every))[:, interface.slots].flatten(0, 1) for table in whole))
