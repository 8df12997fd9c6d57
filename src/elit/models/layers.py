"""Layers of every backbone.

B batch, C channels, N spatial tokens, L tokens of any sequence, d width, H heads, h = d / H head width,
p patch, one entry an axis: (row, column) or (frame, row, column).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elit.models.windows import Windows


def patchify(x: Tensor, patch: Sequence[int], windows: Windows) -> Tensor:
    """(B, C, *size) -> (B, N, prod(p)·C), window by window: Read and Write then see (B·G, n, d) as a view."""
    axes = range(len(patch))
    shape = [part for side, p in zip(windows.grid, patch, strict=True) for part in (side, p)]
    # (B, C, g1, p1, g2, p2, ...) -> (B, g1, g2, ..., p1, p2, ..., C)
    x = x.reshape(*x.shape[:2], *shape).permute(0, *(2 + 2 * i + part for part in range(2) for i in axes), 1)
    return x.flatten(1, len(patch)).flatten(2).index_select(1, windows.order)


def unpatchify(tokens: Tensor, patch: Sequence[int], windows: Windows) -> Tensor:
    """(B, N, prod(p)·C) -> (B, C, *size): the exact inverse of `patchify`."""
    axes = len(patch)
    x = tokens.index_select(1, windows.inverse).reshape(tokens.shape[0], *windows.grid, *patch, -1)
    x = x.permute(0, 1 + 2 * axes, *(1 + i + part * axes for i in range(axes) for part in range(2)))
    return x.reshape(*x.shape[:2], *(side * p for side, p in zip(windows.grid, patch, strict=True)))


class Rope(NamedTuple):
    """Rotary tables of one sequence, float32; pairs are (i, i + h/2), the sine carries the sign of its half."""

    cos: Tensor  # (L, 1, h)
    sin: Tensor  # (L, 1, h)


def rope_tables(positions: Tensor, head_width: int, theta: float = 100.0) -> Rope:
    """Rotary tables for 1 to 4 coordinates a token, (L, coordinates), which share the h/2 pairs evenly."""
    pairs, count = head_width // 2, positions.shape[1]
    shares = [pairs // count + (i >= count - pairs % count) for i in range(count)]
    angles = []
    for i, share in enumerate(shares):
        exponent = torch.arange(share, device=positions.device, dtype=torch.float32) / share
        angles.append(positions[:, i : i + 1] * theta**-exponent)
    angle = torch.cat(angles, dim=1)[:, None]  # (L, 1, h/2)
    return Rope(torch.cat((angle, angle), -1).cos(), torch.cat((-angle, angle), -1).sin())


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotary embedding of queries or keys (B, L, H, h); the arithmetic is float32."""
    return torch.addcmul(x * rope.cos, x.roll(x.shape[-1] // 2, -1), rope.sin)


class QKNorm(nn.RMSNorm):
    """RMS normalisation over a head's width, learned scale; stays one fused kernel under autocast."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


SHORT_CPU_SEQUENCE = 512
MAX_LAUNCH = 65_535  # rows of a batch, here windows, that CUDA's attention kernels take


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √h) v, (B, L, H, h) each -> (B, Lq, d); mask (B, 1, 1, Lk) bool, True = look there."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    # There, gradients of torch's fused kernel take up to six times as long; a fake tensor stands for one of a GPU.
    bf16_training = q.device.type == "cpu" and type(q) is Tensor and q.dtype == torch.bfloat16 and q.requires_grad
    if bf16_training and mask is None and k.shape[2] <= SHORT_CPU_SEQUENCE:
        x = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1).to(v.dtype) @ v
    elif q.shape[0] > MAX_LAUNCH and not torch.compiler.is_exporting():
        parts = [each.split(MAX_LAUNCH) for each in (q, k, v, *([] if mask is None else [mask]))]
        x = torch.cat([F.scaled_dot_product_attention(*part) for part in zip(*parts, strict=True)])
    else:
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return x.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Full attention with QK normalisation and rotary positions."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm: nn.Module = QKNorm(width // num_heads)
        self.k_norm: nn.Module = QKNorm(width // num_heads)
        self.proj = nn.Linear(width, width)

    def project(self, x: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, d) -> q, k, v, each (B, L, H, h); no rotation without `rope`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return q.to(v.dtype), k.to(v.dtype), v

    def forward(self, x: Tensor, rope: Rope | None, mask: Tensor | None = None) -> Tensor:
        return self.proj(attend(*self.project(x, rope), mask))


def sliceable(weight: Tensor, like: Tensor | None = None) -> Tensor:
    """A parameter to slice, in the dtype of the tokens it joins, so that under autocast their stream keeps its own."""
    weight = weight if torch.is_grad_enabled() else weight.detach()
    return weight if like is None else weight.to(like.dtype)


class Mlp(nn.Module):
    """Linear, tanh-GELU, linear: (..., dim) -> (..., dim), `hidden_dim` wide between."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool = True):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, bias)
        self.fc2 = nn.Linear(hidden_dim, dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


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
        """queries (B·G, Lq, d), or (B, Lq, d) for all windows alike; context (B·G, Lk, d) -> each (B·G, L, H, h)."""
        q = self.q_norm(self.q(queries).unflatten(-1, (self.num_heads, -1)))
        k, v = self.kv(context).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        windows = context.shape[0] // queries.shape[0]
        if windows > 1:
            q = q[:, None].expand(-1, windows, -1, -1, -1).flatten(0, 1)
        return q.to(v.dtype), self.k_norm(k).to(v.dtype), v

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        return self.proj(attend(*self.project(queries, context)))  # (B·G, Lq, d)

    def weights(self, queries: Tensor, context: Tensor) -> Tensor:
        """The attention map itself, (B·G, H, Lq, Lk)."""
        q, k, _ = self.project(queries, context)
        return (q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5).softmax(-1)


class Modulation(nn.Module):
    """adaLN: conditioning (B, c) -> `chunks` tensors (B, 1, d), c = d if not given; zero at the start (adaLN-Zero)."""

    def __init__(self, width: int, chunks: int, condition_width: int | None = None):
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(condition_width or width, chunks * width)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(c))[:, None].chunk(self.chunks, dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, 1 + scale)


def layer_norm(width: int, affine: bool = False) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=affine)


class Block(nn.Module):
    """A transformer block with adaLN-Zero conditioning; the same for spatial tokens and for latents."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float = 4.0, condition_width: int | None = None):
        super().__init__()
        self.modulation = Modulation(width, 6, condition_width)
        self.norm1, self.norm2 = layer_norm(width), layer_norm(width)
        self.attention = SelfAttention(width, num_heads)
        self.mlp = Mlp(width, int(mlp_ratio * width))

    def forward(self, x: Tensor, c: Tensor, rope: Rope) -> Tensor:
        """x (B, L, d), c (B, condition width) -> (B, L, d)."""
        shift, scale, *rest = self.modulation(c)
        mixed = attend(*self.attention.project(modulate(self.norm1(x), shift, scale), rope))
        return self.finish(x, mixed, *rest)

    def finish(self, x: Tensor, mixed: Tensor, gate1: Tensor, shift: Tensor, scale: Tensor, gate2: Tensor) -> Tensor:
        """The rest of the block after attention: its output projection into the residual stream, and the MLP."""
        x = x + gate1 * self.attention.proj(mixed)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift, scale))


class FinalLayer(nn.Module):
    """Tokens to patches of velocity: (B, N, d) -> (B, N, prod(p)·C)."""

    def __init__(self, width: int, out_features: int):
        super().__init__()
        self.modulation = Modulation(width, 2)
        self.norm = layer_norm(width)
        self.linear = nn.Linear(width, out_features)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c)
        return self.linear(modulate(self.norm(x), shift, scale))


def weight_groups(network: nn.Module, blocks: Iterable[nn.Module], optimizer: str) -> dict[str, list[nn.Parameter]]:
    """Trained weights by what moves them: all for adam; else matrices for muon, and those without decay."""
    inside = {weight for block in blocks for weight in block.parameters()} if optimizer == "muon" else ()
    modules = [module for module in network.modules() if not isinstance(module, nn.Embedding)]
    decaying = {weight for each in modules if isinstance(weight := getattr(each, "weight", None), nn.Parameter)}
    groups: dict[str, list[nn.Parameter]] = {}
    for weight in filter(lambda weight: weight.requires_grad, network.parameters()):
        kind = "adamw" if weight in decaying and weight.ndim > 1 else "adamw without decay"
        kind = "muon" if kind == "adamw" and weight.ndim == 2 and weight in inside else kind
        groups.setdefault("adam" if optimizer == "adam" else kind, []).append(weight)
    return groups


def initialize(network: nn.Module) -> None:
    """Xavier linears with zero bias, and every adaLN and the output at zero, as DiT starts; labels start larger."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
    for module in network.modules():
        if isinstance(module, Modulation | FinalLayer):
            nn.init.zeros_(module.linear.weight)
