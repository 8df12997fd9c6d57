"""The interface of an elastified transformer: Read into latents that carry the group's own tokens, Write their change.

B batch, G groups, n tokens of a group, N = G·n, J̃ latents of a group kept, K = G·J̃, d width. Sequences (B, N, d) and
(B, K, d) are in the model's own raster order; the plan says how to group them.

Two modes. *learned* is the paper's (section 3): latents are learned vectors, Write adds what cross-attention finds.
*carry* keeps a pretrained core alive: latent j of a group starts as the token at the window's j-th place, coarse to
fine, plus the learned vector, which starts at zero; Write hands each token the change that its latent went through.
"""

import torch
from torch import Tensor, nn

from elit.elastic.token_order import Plan
from elit.models.interface import LatentInterface
from elit.models.layers import initialize


class ElasticInterface(LatentInterface):
    """Latents, Read and Write around the core of a pretrained transformer; J = n."""

    def __init__(self, width: int, num_heads: int, window_tokens: int, condition_width: int, *, carry: bool):
        super().__init__(width, num_heads, window_tokens, window_tokens, condition_width)
        self.carry = carry
        initialize(self)
        self.initialize()
        if carry:
            nn.init.zeros_(self.latents)

    def start(self, tokens: Tensor, c: Tensor, plan: Plan) -> Tensor:
        """tokens (B, N, d), c (B, condition width) -> latents (B, K, d)."""
        grouped = self._grouped(tokens[:, plan.grouped])  # (B·G, n, d)
        latents = self.latents[: plan.kept]  # (J̃, d)
        if self.carry:
            latents = latents + grouped[:, plan.slots].unflatten(0, (len(tokens), -1))  # (B, G, J̃, d)
        read = self.reader(latents, grouped + self.position, c.to(self.latents.dtype))
        return read[:, plan.to_core].to(tokens.dtype)

    def finish(self, tokens: Tensor, start: Tensor, latents: Tensor, plan: Plan) -> Tensor:
        """tokens (B, N, d) before Read; latents (B, K, d) before (`start`) and after the core -> tokens (B, N, d)."""
        grouped = self._grouped(tokens[:, plan.grouped])  # (B·G, n, d)
        after = self._of_groups(latents, plan)  # (B·G, J̃, d)
        if self.carry:
            # s + (l_out − l_in), in the order that gives back l_out to the bit where s = l_in.
            before = self._of_groups(start, plan)
            grouped = self._spread(after, plan) + (grouped - self._spread(before, plan))
        written = self.writer(grouped, self.position, after)
        return written.reshape(tokens.shape)[:, plan.ungrouped].to(tokens.dtype)

    def _of_groups(self, latents: Tensor, plan: Plan) -> Tensor:
        return latents[:, plan.from_core].reshape(-1, plan.kept, latents.shape[2])

    def _spread(self, latents: Tensor, plan: Plan) -> Tensor:
        """(B·G, J̃, d) -> (B·G, n, d): each place takes the mean of the nearest carried ones."""
        if plan.full:
            return latents[:, torch.argsort(plan.slots)]
        return plan.spread.to(latents.dtype) @ latents
