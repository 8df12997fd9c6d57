"""ELIT-DiT as one writes it at first: full-length tensors at every budget, and masks. Same weights, same outputs.

What `elit` does not do, and this does:
    latents are (B, G·J, d) at every budget; dropped ones are zeroed after Read, and masked as keys in core and Write
    modulation is expanded to every token before it is used
    tokens lie in raster order, and are gathered into windows for Read and Write, and back after it
    positions and the order of the windows are made anew in every call

B batch, N spatial tokens, G groups, n = N / G tokens of one, J latents of one, L tokens of any sequence, d width,
H heads, h = d / H.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elit.budgets import Budget, resolve_budget
from elit.models.conditioning import ClassConditioning
from elit.models.dit import DiT


class NaiveDiT(nn.Module):
    """The network of an ELIT-DiT for images, with a copy of its weights; called as that is."""

    def __init__(self, model: DiT):
        super().__init__()
        config, spec = model.config, model.spec
        if spec is None:
            raise ValueError("naive: a network without latents has none to mask")
        width, heads, features = config.hidden_size, config.num_heads, model.patch_embed.in_features
        hidden = int(config.mlp_ratio * width)
        self.patch, self.window, self.split, self.budgets = model.patch_size, spec.window, spec.split, model.budgets
        self.patch_embed = nn.Linear(features, width)
        self.conditioning = ClassConditioning(width, config.num_classes)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(config.depth))
        self.latent_interface = Interface(width, heads, spec.num_latents, spec.window[0] * spec.window[1])
        self.final = Final(width, features)
        self.load_state_dict(model.state_dict())
        self.to(model.device, model.dtype)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, budget: Budget = None) -> Tensor:
        """Velocity of x (B, C, H, W) at t (B,) for classes y (B,)."""
        num_latents, device = resolve_budget(budget, self.budgets) or 0, x.device
        batch, channels, high, wide = x.shape
        p, q = self.patch
        rows, columns = high // p, wide // q
        raster = grid(rows, columns).to(device)  # (N, 2)
        order = window_order(rows, columns, self.window).to(device)  # (N,)
        groups = grid(rows // self.window[0], columns // self.window[1]).to(device)  # (G, 2)
        count = len(self.latent_interface.latents)
        slots = torch.arange(count, device=device).repeat(len(groups))  # (G·J,)
        places = torch.cat((slots[:, None], groups.repeat_interleave(count, 0)), 1)  # (G·J, 3)
        keep = slots < num_latents  # (G·J,)

        (c,) = self.conditioning(t, y)  # (B, d)
        s = x.reshape(batch, channels, rows, p, columns, q).permute(0, 2, 4, 3, 5, 1)
        s = self.patch_embed(s.reshape(batch, rows * columns, -1))  # (B, N, d)
        head, core, _ = self.split
        for block in self.blocks[:head]:
            s = block(s, c, raster)
        latents = self.latent_interface.read(s, c, order, keep)  # (B, G·J, d)
        for block in self.blocks[head : head + core]:
            latents = block(latents, c, places, keep)
        s = self.latent_interface.write(s, latents, order, keep)
        for block in self.blocks[head + core :]:
            s = block(s, c, raster)
        s = self.final(s, c).reshape(batch, rows, columns, p, q, channels)
        return s.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


class Modulation(nn.Module):
    def __init__(self, width: int, chunks: int):
        super().__init__()
        self.linear, self.chunks = nn.Linear(width, chunks * width), chunks

    def forward(self, c: Tensor, length: int) -> tuple[Tensor, ...]:
        """(B, d) -> as many (B, L, d) as there are chunks: every token has its own."""
        return self.linear(F.silu(c))[:, None].repeat(1, length, 1).chunk(self.chunks, -1)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Attention(nn.Module):
    """Self-attention with rotary positions, or from one sequence to another without."""

    def __init__(self, width: int, heads: int, *, cross: bool):
        super().__init__()
        self.heads = heads
        if cross:
            self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        else:
            self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = (nn.RMSNorm(width // heads, eps=1e-6) for _ in range(2))
        self.proj = nn.Linear(width, width)

    def within(self, x: Tensor, places: Tensor, keep: Tensor | None) -> Tensor:
        q, k, v = (self.in_heads(part) for part in self.qkv(x).chunk(3, -1))
        return self.attend(turned(self.q_norm(q), places), turned(self.k_norm(k), places), v, keep)

    def across(self, queries: Tensor, context: Tensor, keep: Tensor | None) -> Tensor:
        k, v = (self.in_heads(part) for part in self.kv(context).chunk(2, -1))
        return self.attend(self.q_norm(self.in_heads(self.q(queries))), self.k_norm(k), v, keep)

    def in_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, L, h)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        """keep (Lk,) bool: the keys that exist, None = all."""
        mask = None if keep is None else keep.expand(len(q), 1, q.shape[2], -1)
        x = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.modulation = Modulation(width, 6)
        self.attention, self.mlp = Attention(width, heads, cross=False), Mlp(width, hidden)

    def forward(self, x: Tensor, c: Tensor, places: Tensor, keep: Tensor | None = None) -> Tensor:
        """x (B, L, d) at coordinates `places` (L, axes); keep (L,) bool = the tokens that may be looked at."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c, x.shape[1])
        x = x + gate1 * self.attention.within(normalise(x) * (1 + scale1) + shift1, places, keep)
        return x + gate2 * self.mlp(normalise(x) * (1 + scale2) + shift2)


class Read(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.modulation, self.norm_tokens = Modulation(width, 6), nn.LayerNorm(width, eps=1e-6)
        self.attention, self.mlp = Attention(width, heads, cross=True), Mlp(width, width)

    def forward(self, x: Tensor, windows: Tensor, c: Tensor) -> Tensor:
        """Latents x (B, G·J, d), tokens (B·G, n, d) -> (B, G·J, d)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c, x.shape[1])
        queries = (normalise(x) * (1 + scale1) + shift1).reshape(len(windows), -1, x.shape[2])  # (B·G, J, d)
        x = x + gate1 * self.attention.across(queries, self.norm_tokens(windows), None).view_as(x)
        return x + gate2 * self.mlp(normalise(x) * (1 + scale2) + shift2)


class Write(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm_tokens, self.norm_latents, self.norm_mlp = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.attention, self.mlp = Attention(width, heads, cross=True), Mlp(width, width)

    def forward(self, x: Tensor, position: Tensor, latents: Tensor, keep: Tensor) -> Tensor:
        """Tokens x (B·G, n, d), position (n, d), latents (B·G, J, d), keep (J,) -> (B·G, n, d)."""
        x = x + self.attention.across(self.norm_tokens(x + position), self.norm_latents(latents), keep)
        return x + self.mlp(self.norm_mlp(x))


class Interface(nn.Module):
    def __init__(self, width: int, heads: int, latents: int, tokens: int):
        super().__init__()
        self.latents, self.position = (nn.Parameter(torch.empty(count, width)) for count in (latents, tokens))
        self.reader, self.writer = Read(width, heads), Write(width, heads)

    def read(self, s: Tensor, c: Tensor, order: Tensor, keep: Tensor) -> Tensor:
        """Tokens (B, N, d) in raster order -> latents (B, G·J, d), zero where dropped."""
        latents = self.latents.repeat(len(s), len(keep) // len(self.latents), 1)  # (B, G·J, d)
        return self.reader(latents, self.windows(s, order) + self.position, c) * keep[:, None]

    def write(self, s: Tensor, latents: Tensor, order: Tensor, keep: Tensor) -> Tensor:
        """Tokens (B, N, d) in raster order, latents (B, G·J, d) -> tokens (B, N, d) in raster order."""
        count = len(self.latents)
        grouped = latents.reshape(-1, count, s.shape[2])  # (B·G, J, d)
        written = self.writer(self.windows(s, order), self.position, grouped, keep[:count])
        return written.reshape(s.shape)[:, order.argsort()]

    def windows(self, s: Tensor, order: Tensor) -> Tensor:
        return s[:, order].reshape(-1, len(self.position), s.shape[2])  # (B·G, n, d)


class Final(nn.Module):
    def __init__(self, width: int, features: int):
        super().__init__()
        self.modulation, self.linear = Modulation(width, 2), nn.Linear(width, features)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c, x.shape[1])
        return self.linear(normalise(x) * (1 + scale) + shift)


def normalise(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def turned(x: Tensor, places: Tensor) -> Tensor:
    """Rotary positions of queries or keys (B, H, L, h) at `places` (L, axes), float32."""
    pairs, axes = x.shape[-1] // 2, places.shape[1]
    angles = []
    for axis in range(axes):
        share = pairs // axes + (axis >= axes - pairs % axes)
        speed = 100.0 ** -(torch.arange(share, device=x.device) / share)
        angles.append(places[:, axis : axis + 1] * speed)
    angle = torch.cat(angles, 1)  # (L, h/2)
    first, second = x.float().chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def window_order(rows: int, columns: int, window: tuple[int, ...]) -> Tensor:
    """Raster numbers of the tokens, window by window, (N,)."""
    numbers = torch.arange(rows * columns).reshape(rows // window[0], window[0], columns // window[1], window[1])
    return numbers.transpose(1, 2).flatten()


def grid(rows: int, columns: int) -> Tensor:
    """(row, column) of every cell in raster order, (rows·columns, 2)."""
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
