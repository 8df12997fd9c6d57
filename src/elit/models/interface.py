"""The latent interface of ELIT: latents, Read, Write and the tail drop (paper section 3, Figure 3).

B batch, G windows, n spatial tokens of a window, N = G·n, J latents of a window, J̃ of them kept, K = G·J̃, d width.

    spatial tokens (B, N, d) --Read--> latents (B, K, d) --core--> latents (B, K, d) --Write--> tokens (B, N, d)

Tokens and latents lie window by window, so (B, N, d) is (B·G, n, d) as a view, and cross-attention stays in its window.
A budget is a slice: `latents[:J̃]`. Nothing is computed for the dropped tail, and nothing depends on it.
"""

from math import prod

import torch
from torch import Tensor, nn

from elit.models.layers import Mlp, Modulation, QKNorm, attention, layer_norm, modulate, sliceable
from elit.models.sizes import InterfaceSpec as InterfaceSpec
from elit.models.windows import Shape, Windows, joined


class CrossAttention(nn.Module):
    """Attention from queries to keys and values of the same window, with QK normalisation."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.q_norm: nn.Module = QKNorm(width // num_heads)
        self.k_norm: nn.Module = QKNorm(width // num_heads)
        self.proj = nn.Linear(width, width)

    def project(self, queries: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """queries (B·G, Lq, d) or, for all windows of a sample alike, (B, Lq, d); context (B·G, Lk, d)."""
        q = self.q_norm(self.q(queries).unflatten(-1, (self.num_heads, -1)))
        k, v = self.kv(context).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        windows = context.shape[0] // queries.shape[0]
        if windows > 1:
            q = q[:, None].expand(-1, windows, -1, -1, -1).flatten(0, 1)
        q, k, v = (part.transpose(1, 2) for part in (q, self.k_norm(k), v))  # each (B·G, H, L, h)
        return q.to(v.dtype), k.to(v.dtype), v

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        x = attention(*self.project(queries, context))
        return self.proj(x.transpose(1, 2).flatten(2))  # (B·G, Lq, d)

    def weights(self, queries: Tensor, context: Tensor) -> Tensor:
        """The attention map itself, (B·G, H, Lq, Lk)."""
        q, k, _ = self.project(queries, context)
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)


class Read(nn.Module):
    """l_ca = l + CA(l; s), l_out = l_ca + MLP(l_ca), pre-norm, adaLN-Zero from the blocks' conditioning."""

    def __init__(self, width: int, num_heads: int, condition_width: int | None = None):
        super().__init__()
        self.modulation = Modulation(width, 6, condition_width)
        self.norm_latents, self.norm_mlp = layer_norm(width), layer_norm(width)
        self.norm_tokens = layer_norm(width, affine=True)
        self.attention = CrossAttention(width, num_heads)
        self.mlp = Mlp(width, width)

    def queries(self, latents: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        if latents.ndim == 2:  # all windows start from the same latents: (B, J̃, d) queries serve all of them
            return modulate(self.norm_latents(latents), shift, scale)
        return modulate(self.norm_latents(latents), shift[:, None], scale[:, None]).flatten(0, 1)  # (B·G, J̃, d)

    def forward(self, latents: Tensor, tokens: Tensor, c: Tensor) -> Tensor:
        """latents (J̃, d) or, each window its own, (B, G, J̃, d); tokens (B·G, n, d), c (B, d) -> (B, G·J̃, d)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)
        attended = self.attention(self.queries(latents, shift1, scale1), self.norm_tokens(tokens))  # (B·G, J̃, d)
        l_ca = latents + gate1[:, None] * attended.unflatten(0, (c.shape[0], -1))  # (B, G, J̃, d)
        x = l_ca.flatten(1, 2)
        return x + gate2 * self.mlp(modulate(self.norm_mlp(x), shift2, scale2))

    def attention_map(self, latents: Tensor, tokens: Tensor, c: Tensor) -> Tensor:
        """(B·G, H, J̃, n)."""
        shift, scale, *_ = self.modulation(c)
        return self.attention.weights(self.queries(latents, shift, scale), self.norm_tokens(tokens))


class Write(nn.Module):
    """s_ca = s + CA(s; l), s_out = s_ca + MLP(s_ca), pre-norm, no adaLN; closed at the start of training."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm_tokens, self.norm_latents = layer_norm(width, affine=True), layer_norm(width, affine=True)
        self.norm_mlp = layer_norm(width, affine=True)
        self.attention = CrossAttention(width, num_heads)
        self.mlp = Mlp(width, width)

    def forward(self, tokens: Tensor, position: Tensor, latents: Tensor) -> Tensor:
        """tokens (B·G, n, d), position (n, d), latents (B·G, J̃, d) -> (B·G, n, d)."""
        x = tokens + self.attention(self.norm_tokens(tokens + position), self.norm_latents(latents))
        return x + self.mlp(self.norm_mlp(x))


class LatentInterface(nn.Module):
    """The learned latents, shared by all windows, and the two cross-attentions around the core."""

    def __init__(self, width: int, num_heads: int, window: Shape, num_latents: int, condition_width: int | None = None):
        super().__init__()
        self.latents = nn.Parameter(torch.empty(num_latents, width))
        # Cross-attention sees no RoPE; this says where in its window a token is.
        self.position = nn.Parameter(torch.empty(prod(window), width))
        self.reader = Read(width, num_heads, condition_width)
        self.writer = Write(width, num_heads)

    def initialize(self) -> None:
        # About as large as the tokens they meet; much smaller, and Read is slow to tell places in a window apart.
        nn.init.normal_(self.latents, std=0.5)
        nn.init.normal_(self.position, std=0.5)
        nn.init.zeros_(self.writer.attention.proj.weight)
        nn.init.zeros_(self.writer.mlp.fc2.weight)

    def read(self, s: Tensor, c: Tensor, windows: Windows, budget: int) -> Tensor:
        """Tokens (B, N, d), c (B, d) -> the first latents of every window (B, K, d)."""
        groups = zip(windows.latents(budget), windows.groups(s), windows.crops(sliceable(self.position)), strict=True)
        return joined([self.reader(sliceable(self.latents)[:j], tokens + at, c) for j, tokens, at in groups], dim=1)

    def write(self, s: Tensor, latents: Tensor, windows: Windows, budget: int) -> Tensor:
        """Tokens (B, N, d), latents (B, K, d) -> tokens (B, N, d)."""
        positions = windows.crops(sliceable(self.position))
        groups = zip(windows.groups(s), positions, windows.groups(latents, budget), strict=True)
        return joined([self.writer(*group).view(len(s), -1, s.shape[2]) for group in groups], dim=1)
