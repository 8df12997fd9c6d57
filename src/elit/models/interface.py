"""The latent interface of ELIT: latents, Read, Write and the tail drop (paper section 3, Figure 3).

B batch, G groups, n spatial tokens of a group, N = G·n, J latents of a group, J̃ of them kept, K = G·J̃, d width.

    spatial tokens (B, N, d) --Read--> latents (B, K, d) --core--> latents (B, K, d) --Write--> tokens (B, N, d)

Tokens and latents are group-major, so (B, N, d) is (B·G, n, d) as a view, and cross-attention stays in its group.
A budget is a slice: `latents[:J̃]`. Nothing is computed for the dropped tail, and nothing depends on it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from elit.models.layers import Mlp, Modulation, QKNorm, attention, grid_positions, layer_norm, modulate
from elit.models.layout import InterfaceSpec as InterfaceSpec
from elit.models.layout import Part, Shape, divides
from elit.models.windows import corner, windows_of


def sliceable(weight: Tensor) -> Tensor:
    """A parameter to slice. Without gradients a slice of a parameter itself still claims to need one, and has no
    function to give it, over which torch's module tracker (of FlopCounterMode, for one) stumbles in the next module.
    """
    return weight if torch.is_grad_enabled() else weight.detach()


class CrossAttention(nn.Module):
    """Attention from queries to keys and values of the same group, with QK normalisation."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.q_norm: nn.Module = QKNorm(width // num_heads)
        self.k_norm: nn.Module = QKNorm(width // num_heads)
        self.proj = nn.Linear(width, width)

    def project(self, queries: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """queries (B·G, Lq, d) or, where all groups of a sample ask the same, (B, Lq, d); context (B·G, Lk, d)."""
        q = self.q_norm(self.q(queries).unflatten(-1, (self.num_heads, -1)))
        k, v = self.kv(context).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        groups = context.shape[0] // queries.shape[0]
        if groups > 1:
            q = q[:, None].expand(-1, groups, -1, -1, -1).flatten(0, 1)
        q, k, v = (part.transpose(1, 2) for part in (q, self.k_norm(k), v))  # each (B·G, H, L, h)
        return q.to(v.dtype), k.to(v.dtype), v

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        x = attention(*self.project(queries, context))
        return self.proj(x.transpose(1, 2).flatten(2))  # (B·G, Lq, d)

    def weights(self, queries: Tensor, context: Tensor) -> Tensor:
        """The attention map itself, (B·G, H, Lq, Lk), for looking inside."""
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
        if latents.ndim == 2:  # all groups start from the same latents: (B, J̃, d) queries serve all of them
            return modulate(self.norm_latents(latents), shift, scale)
        return modulate(self.norm_latents(latents), shift[:, None], scale[:, None]).flatten(0, 1)  # (B·G, J̃, d)

    def forward(self, latents: Tensor | Sequence[Tensor], tokens: Tensor | Sequence[Tensor], c: Tensor) -> Tensor:
        """latents (J̃, d) or, each group its own, (B, G, J̃, d); tokens (B·G, n, d), c (B, d) -> (B, G·J̃, d).

        Where windows have several shapes, a list of each: the latents of all come back, shape by shape.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)
        shapes: list[Any] = (
            [(latents, tokens)] if isinstance(tokens, Tensor) else list(zip(latents, tokens, strict=True))
        )
        read = []
        for start, of_shape in shapes:
            looked = self.attention(self.queries(start, shift1, scale1), self.norm_tokens(of_shape))  # (B·G, J̃, d)
            l_ca = start + gate1[:, None] * looked.unflatten(0, (c.shape[0], -1))  # (B, G, J̃, d)
            read.append(l_ca.flatten(1, 2))
        x = read[0] if len(read) == 1 else torch.cat(read, 1)  # (B, K, d)
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

    def forward(
        self,
        tokens: Tensor | Sequence[Tensor],
        position: Tensor | Sequence[Tensor],
        latents: Tensor | Sequence[Tensor],
    ) -> Any:
        """tokens (B·G, n, d), position (n, d), latents (B·G, J̃, d) -> (B·G, n, d).

        Where windows have several shapes, a list of each, and a list comes back.
        """
        if isinstance(tokens, Tensor):
            return self.written(tokens, position, latents)
        return [self.written(*of_shape) for of_shape in zip(tokens, position, latents, strict=True)]

    def written(self, tokens: Any, position: Any, latents: Any) -> Tensor:
        x = tokens + self.attention(self.norm_tokens(tokens + position), self.norm_latents(latents))
        return x + self.mlp(self.norm_mlp(x))


class LatentInterface(nn.Module):
    """The learned latents, shared by all groups, and the two cross-attentions around the core."""

    def __init__(
        self, width: int, num_heads: int, tokens_per_group: int, num_latents: int, condition_width: int | None = None
    ):
        super().__init__()
        self.latents = nn.Parameter(torch.empty(num_latents, width))
        # Cross-attention sees no RoPE; this says where in its window a token is.
        self.position = nn.Parameter(torch.empty(tokens_per_group, width))
        self.reader = Read(width, num_heads, condition_width)
        self.writer = Write(width, num_heads)

    def initialize(self) -> None:
        # About as large as the tokens they meet; much smaller, and Read is slow to tell places in a window apart.
        nn.init.normal_(self.latents, std=0.5)
        nn.init.normal_(self.position, std=0.5)
        nn.init.zeros_(self.writer.attention.proj.weight)
        nn.init.zeros_(self.writer.mlp.fc2.weight)

    def read(
        self, tokens: Tensor, c: Tensor, num_latents: int, parts: Sequence[Part] = (), window: Shape = ()
    ) -> Tensor:
        """tokens (B, N, d) -> the first `num_latents` of every group (B, K, d).

        parts: where windows of at most `window` have several shapes, what each of them keeps.
        """
        if not parts:
            return self.reader(sliceable(self.latents)[:num_latents], self._grouped(tokens) + self.position, c)
        positions = [corner(sliceable(self.position), part.shape, window) for part in parts]
        grouped = _split(tokens, [(part.windows, part.tokens) for part in parts])
        seen = [of_part + position for of_part, position in zip(grouped, positions, strict=True)]
        return self.reader([sliceable(self.latents)[: part.num_latents] for part in parts], seen, c)

    def write(self, tokens: Tensor, latents: Tensor, parts: Sequence[Part] = (), window: Shape = ()) -> Tensor:
        """tokens (B, N, d), latents (B, K, d) -> (B, N, d); parts and window as in `read`."""
        if parts:
            positions = [corner(sliceable(self.position), part.shape, window) for part in parts]
            grouped = _split(tokens, [(part.windows, part.tokens) for part in parts])
            split = _split(latents, [(part.windows, part.num_latents) for part in parts])
            written = self.writer(grouped, positions, split)
            return torch.cat([of_part.reshape(len(tokens), -1, tokens.shape[2]) for of_part in written], 1)
        of_group = self._grouped(tokens)
        return self.writer(of_group, self.position, latents.reshape(len(of_group), -1, latents.shape[2])).view_as(
            tokens
        )

    def _grouped(self, tokens: Tensor) -> Tensor:
        return tokens.reshape(-1, len(self.position), tokens.shape[2])  # (B·G, n, d), a view


def _split(sequence: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """(B, L, d), shape by shape -> for each shape's (windows, entries of one) its groups (B·windows, entries, d)."""
    split = sequence.split([windows * entries for windows, entries in sizes], 1)
    return [part.reshape(-1, entries, sequence.shape[2]) for part, (_, entries) in zip(split, sizes, strict=True)]


def latent_positions(grid: Shape, window: Shape, parts: Sequence[Part], device: torch.device) -> Tensor:
    """RoPE coordinates of the latents, (K, 1 + axes): (slot, group row, group column), for video with frame."""
    if divides(grid, window):
        counts = [length // side for length, side in zip(grid, window, strict=True)]
        groups = [grid_positions(counts, counts, device)]
    else:
        groups = list(windows_of(grid, window, device).groups.float().split([part.windows for part in parts]))
    positions = []
    for group, part in zip(groups, parts, strict=True):
        slot = torch.arange(part.num_latents, device=device, dtype=torch.float32)[:, None].expand(len(group), -1, 1)
        positions.append(torch.cat((slot, group[:, None].expand(-1, part.num_latents, -1)), dim=-1).flatten(0, 1))
    return torch.cat(positions)
