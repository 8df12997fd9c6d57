"""The latent interface of ELIT: latents, Read, Write and the tail drop (paper section 3, Figure 3).

B batch, G windows, n spatial tokens of a window, N = G·n, J latents of a window, J̃ of them kept, K = G·J̃, d width.

    spatial tokens (B, N, d) --Read--> latents (B, K, d) --core--> latents (B, K, d) --Write--> tokens (B, N, d)

Tokens and latents lie window by window, so (B, N, d) is (B·G, n, d) as a view, and cross-attention stays in its window.
A budget is a slice: `latents[:J̃]`. Nothing is computed for the dropped tail, and nothing depends on it.
"""

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor, nn

from elit.budgets import Budget, resolve_budget
from elit.config import require
from elit.models.layers import CrossAttention, Mlp, Modulation, initialize, layer_norm, modulate, sliceable
from elit.models.windows import Shape, Windows, joined, windows_of

Core = Callable[..., Tensor]
Width = int | None


class Read(nn.Module):
    """l_ca = l + CA(l; s), l_out = l_ca + MLP(l_ca), pre-norm; adaLN-Zero where there is a condition width."""

    def __init__(self, width: int, num_heads: int, condition_width: int | None):
        super().__init__()
        self.modulation = None if condition_width is None else Modulation(width, 6, condition_width)
        self.norm_latents, self.norm_mlp = layer_norm(width), layer_norm(width)
        self.norm_tokens = layer_norm(width, affine=True)
        self.attention = CrossAttention(width, num_heads)
        self.mlp = Mlp(width, width)

    def modulate(self, c: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of the attention and of the MLP, each (B, 1, d)."""
        if self.modulation is not None:
            return self.modulation(c)
        zero = c.new_zeros(c.shape[0], 1, self.mlp.fc1.in_features)
        return (zero, zero, zero + 1) * 2

    def inputs(self, latents: Tensor, tokens: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, J̃, d) of all windows alike or, where each has its own, (B·G, J̃, d); and keys' tokens."""
        if latents.ndim == 4:
            shift, scale = shift[:, None], scale[:, None]
        return modulate(self.norm_latents(latents), shift, scale).flatten(0, -3), self.norm_tokens(tokens)

    def forward(self, latents: Tensor, tokens: Tensor, c: Tensor) -> Tensor:
        """latents (J̃, d) or, each window its own, (B, G, J̃, d); tokens (B·G, n, d), c (B, d) -> (B, G·J̃, d)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulate(c)
        attended = self.attention(*self.inputs(latents, tokens, shift1, scale1))  # (B·G, J̃, d)
        l_ca = (latents + gate1[:, None] * attended.unflatten(0, (c.shape[0], -1))).flatten(1, 2)
        return l_ca + gate2 * self.mlp(modulate(self.norm_mlp(l_ca), shift2, scale2))


class Write(nn.Module):
    """s_ca = s + CA(s; l), s_out = s_ca + MLP(s_ca), pre-norm, no adaLN; closed at the start of training."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm_tokens, self.norm_latents, self.norm_mlp = (layer_norm(width, affine=True) for _ in range(3))
        self.attention = CrossAttention(width, num_heads)
        self.mlp = Mlp(width, width)

    def forward(self, tokens: Tensor, position: Tensor, latents: Tensor) -> Tensor:
        """tokens (B·G, n, d), position (n, d), latents (B·G, J̃, d) -> (B·G, n, d)."""
        s_ca = tokens + self.attention(self.norm_tokens(tokens + position), self.norm_latents(latents))
        return s_ca + self.mlp(self.norm_mlp(s_ca))


class LatentInterface(nn.Module):
    """The learned latents, shared by all windows, and the two cross-attentions around the core of any transformer.

    width: d. window: tokens along each axis. num_latents: J. condition_width: of a vector for adaLN-Zero in Read; None
    is plain pre-norm. Write starts closed: a new interface returns its tokens unchanged.
    """

    def __init__(
        self, width: int, num_heads: int, window: Shape = (4, 4), num_latents: int = 16, condition_width: Width = None
    ):
        super().__init__()
        self.window = tuple(window)
        self.latents = nn.Parameter(torch.empty(num_latents, width))
        self.position = nn.Parameter(torch.empty(prod(window), width))  # in a window; cross-attention has no RoPE
        self.reader = Read(width, num_heads, condition_width)
        self.writer = Write(width, num_heads)
        with torch.random.fork_rng(devices=[]):  # a network that holds it draws its own weights
            initialize(self)
            self.initialize()

    def forward(
        self, s: Tensor, core: Core, *, grid: Shape | Windows, condition: Tensor | None = None, budget: Budget = None
    ) -> Tensor:
        """Tokens (B, N, d) through Read, `core` and Write -> (B, N, d). Raises ValueError for a misfit.

        core: called with latents (B, K, d) and float32 (K, 1 + axes), their slot and the place of their window; returns
        (B, K, d). grid: tokens along each axis, of any lengths, in raster order; or the windows by which tokens are
        sorted, then `core` is called with latents alone. condition: (B, condition_width). budget: None = all latents,
        an int = latents kept of a window, a float in (0, 1] = that share.
        """
        windows = grid if isinstance(grid, Windows) else windows_of(tuple(grid), self.window, 1, s.device)
        require(s.shape[1] == prod(windows.grid), "grid", windows.grid, "the axes of the tokens")
        fits, valid = (condition is None) == (self.reader.modulation is None), "given exactly where condition_width is"
        require(fits, "condition", None if condition is None else tuple(condition.shape), valid)
        kept = resolve_budget(budget, range(1, len(self.latents) + 1)) or len(self.latents)
        c = s.new_zeros(s.shape[0], 1) if condition is None else condition
        if isinstance(grid, Windows):
            return self.write(s, core(self.read(s, c, windows, kept)), windows, kept)
        s = s[:, windows.order]
        latents = core(self.read(s, c, windows, kept), windows.coordinates(kept))
        return self.write(s, latents, windows, kept)[:, windows.inverse]

    def initialize(self) -> None:
        for table in (self.latents, self.position):  # as large as the tokens they meet; Read learns slowly otherwise
            nn.init.normal_(table, std=0.5)
        for layer in (self.writer.attention.proj, self.writer.mlp.fc2):
            nn.init.zeros_(layer.weight)

    def read(self, s: Tensor, c: Tensor, windows: Windows, budget: int) -> Tensor:
        """Tokens (B, N, d), c (B, d) -> the first latents of every window (B, K, d)."""
        latents, crops = sliceable(self.latents, s), windows.crops(sliceable(self.position, s))
        groups = zip(windows.latents(budget), windows.groups(s), crops, strict=True)
        return joined([self.reader(latents[:j], tokens + at, c) for j, tokens, at in groups], dim=1)

    def write(self, s: Tensor, latents: Tensor, windows: Windows, budget: int) -> Tensor:
        """Tokens (B, N, d), latents (B, K, d) -> tokens (B, N, d)."""
        groups = windows.groups(s), windows.crops(sliceable(self.position, s)), windows.groups(latents, budget)
        return joined([tokens.view(s.shape[0], -1, s.shape[2]) for tokens in map(self.writer, *groups)], dim=1)
