"""The interface of an elastified transformer: Read into latents that carry the group's own tokens, Write their change.

B batch, G windows, n tokens of a window, J̃ latents of a window kept, d width; N tokens and K latents in all. Sequences
(B, N, d) and (B, K, d) are in the model's own raster order; `KeptTokens` has their grouping.

Two modes. *learned* is the paper's (section 3): latents are learned vectors, Write adds what cross-attention finds.
*carry* keeps a pretrained core alive: latent j of a window starts as the token at its j-th place, coarse to
fine, plus the learned vector, which starts at zero; Write gives each token the change of its latent.
"""

from math import prod
from typing import Any

from torch import Tensor, nn

from elit.elastic.kept_tokens import KeptGrid, KeptTokens
from elit.models.interface import LatentInterface
from elit.models.layers import initialize, sliceable
from elit.models.windows import Shape, joined


class ElasticInterface(LatentInterface):
    """Latents, Read and Write around the core of a pretrained transformer; J = n."""

    def __init__(self, width: int, num_heads: int, window: Shape, condition_width: int, *, carry: bool):
        super().__init__(width, num_heads, window, prod(window), condition_width)
        self.carry = carry
        initialize(self)
        self.initialize()
        if carry:
            nn.init.zeros_(self.latents)

    def forward(self, stage: str, *inputs: Any) -> Tensor:  # pyrefly: ignore[bad-override]
        """`start` or `finish` by name: what offloads weights watches a module's forward, and brings its own along."""
        return getattr(self, stage)(*inputs)

    def start(self, tokens: Tensor, c: Tensor, kept: KeptTokens) -> Tensor:
        """tokens (B, N, d), c (B, condition width) -> latents (B, K, d)."""
        chunks = zip(tokens[:, kept.order].split(kept.tokens, 1), kept.grids, strict=True)
        read = [self.read_grid(s, c.to(self.latents.dtype), grid) for s, grid in chunks]
        return joined(read, 1)[:, kept.to_core].to(tokens.dtype)

    def read_grid(self, s: Tensor, c: Tensor, grid: KeptGrid) -> Tensor:
        """Tokens (B, N, d) of a grid, window by window -> its latents (B, K, d)."""
        if not self.carry:
            return self.read(s, c, grid.windows, grid.budget)
        groups = zip(grid.slots, grid.windows.groups(s), grid.windows.crops(sliceable(self.position)), strict=True)
        latents = []
        for slots, tokens, position in groups:
            start = sliceable(self.latents)[: len(slots)] + tokens[:, slots].unflatten(0, (len(s), -1))  # (B, G, J̃, d)
            latents.append(self.reader(start, tokens + position, c))
        return joined(latents, 1)

    def finish(self, tokens: Tensor, start: Tensor, latents: Tensor, kept: KeptTokens) -> Tensor:
        """tokens (B, N, d) before Read; latents (B, K, d) before (`start`) and after the core -> tokens (B, N, d)."""
        before, after = (each[:, kept.from_core].split(kept.latents, 1) for each in (start, latents))
        chunks = zip(tokens[:, kept.order].split(kept.tokens, 1), before, after, kept.grids, strict=True)
        written = []
        for s, l_in, l_out, grid in chunks:
            if self.carry:
                # s + (l_out − l_in), in the order that gives back l_out to the bit where s = l_in.
                s = grid.spread(l_out) + (s - grid.spread(l_in))
            written.append(self.write(s, l_out.to(self.latents.dtype), grid.windows, grid.budget))
        return joined(written, 1)[:, kept.inverse].to(tokens.dtype)
