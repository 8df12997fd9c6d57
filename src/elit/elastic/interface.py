"""The interface of an elastified transformer: Read into latents that carry the group's own tokens, Write their change.

B batch, G groups, n tokens of a group, J̃ latents of a group kept, d width; N tokens and K latents in all. Sequences
(B, N, d) and (B, K, d) are in the model's own raster order; a `TokenOrder` says how to group them.

Two modes. *learned* is the paper's (section 3): latents are learned vectors, Write adds what cross-attention finds.
*carry* keeps a pretrained core alive: latent j of a group starts as the token at the window's j-th place, coarse to
fine, plus the learned vector, which starts at zero; Write hands each token the change that its latent went through.
"""

from typing import Any

import torch
from torch import Tensor, nn

from elit.elastic.token_order import Carried, TokenOrder
from elit.models.interface import LatentInterface, sliceable
from elit.models.layers import initialize
from elit.models.windows import corner


class ElasticInterface(LatentInterface):
    """Latents, Read and Write around the core of a pretrained transformer; J = n."""

    def __init__(self, width: int, num_heads: int, window_tokens: int, condition_width: int, *, carry: bool):
        super().__init__(width, num_heads, window_tokens, window_tokens, condition_width)
        self.carry = carry
        initialize(self)
        self.initialize()
        if carry:
            nn.init.zeros_(self.latents)

    def forward(self, stage: str, *inputs: Any) -> Tensor:
        """`start` or `finish` by name: what offloads weights watches a module's forward, and brings its own along."""
        output: Tensor = getattr(self, stage)(*inputs)
        return output

    def start(self, tokens: Tensor, c: Tensor, order: TokenOrder) -> Tensor:
        """tokens (B, N, d), c (B, condition width) -> latents (B, K, d)."""
        latents, grouped = [], self._parts(tokens[:, order.grouped], [part.tokens for part in order.parts], order)
        for part, of_part in zip(order.parts, grouped, strict=True):
            start = sliceable(self.latents)[: part.num_latents]  # (J̃, d)
            if self.carry:
                start = start + of_part[:, part.slots].unflatten(0, (len(tokens), -1))  # (B, G, J̃, d)
            latents.append(start)
        seen = [
            of_part + corner(sliceable(self.position), part.shape, order.window)
            for part, of_part in zip(order.parts, grouped, strict=True)
        ]
        read = self.reader(latents, seen, c.to(self.latents.dtype))
        return read[:, order.to_core].to(tokens.dtype)

    def finish(self, tokens: Tensor, start: Tensor, latents: Tensor, order: TokenOrder) -> Tensor:
        """tokens (B, N, d) before Read; latents (B, K, d) before (`start`) and after the core -> tokens (B, N, d)."""
        grouped = self._parts(tokens[:, order.grouped], [part.tokens for part in order.parts], order)
        counts = [part.num_latents for part in order.parts]
        after = self._parts(latents[:, order.from_core], counts, order)
        if self.carry:
            # s + (l_out − l_in), in the order that gives back l_out to the bit where s = l_in.
            before = self._parts(start[:, order.from_core], counts, order)
            grouped = [
                spread(l_out, part) + (s - spread(l_in, part))
                for part, s, l_in, l_out in zip(order.parts, grouped, before, after, strict=True)
            ]
        positions = [corner(sliceable(self.position), part.shape, order.window) for part in order.parts]
        written = self.writer(grouped, positions, [each.to(self.latents.dtype) for each in after])
        of_sample = [part.reshape(len(tokens), -1, tokens.shape[2]) for part in written]
        return torch.cat(of_sample, 1)[:, order.ungrouped].to(tokens.dtype)

    def _parts(self, sequence: Tensor, lengths: list[int], order: TokenOrder) -> list[Tensor]:
        """(B, L, d), window by window, each part's windows of so many entries -> each part's (B·G, entries, d)."""
        split = sequence.split([part.windows * length for part, length in zip(order.parts, lengths, strict=True)], 1)
        return [part.reshape(-1, length, sequence.shape[2]) for part, length in zip(split, lengths, strict=True)]


def spread(latents: Tensor, part: Carried) -> Tensor:
    """(B·G, J̃, d) -> (B·G, n, d): each place takes the mean of the nearest carried ones."""
    if part.num_latents == part.tokens:
        return latents[:, part.spread]
    return part.spread.to(latents.dtype) @ latents


def placed(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    """`module` on a device and in a dtype; fake tensors, with which memory is counted, stay as they were made."""
    some = next(module.parameters())
    return module if (some.device, some.dtype) == (device, dtype) else module.to(device, dtype)
