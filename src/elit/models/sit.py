"""SiT and ELIT-SiT: the network of the published checkpoints, which differs from the paper's text.

B batch, G groups, n spatial tokens of a group, N = G·n, J = n latents of a group, J̃ of them kept, d width, H heads.

Unlike `dit`: sin-cos positions instead of RoPE, no QK-norm in the blocks, a sinusoid of the time itself, 4 channels.
Unlike `interface`: Read modulates the tokens instead of the queries, latents have learned positions in the image, and
Write has no norms. Read and Write take all J latents, the core the first J̃: the output depends on dropped latents too.
"""

from collections.abc import Sequence
from functools import partial
from math import prod
from operator import mul
from typing import Any, ClassVar, Literal, get_args

import torch
from diffusers import ModelMixin as ModelMixin  # diffusers looks for it beside the class when it loads a pipeline
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from elit.budgets import Budget
from elit.config import require
from elit.models.conditioning import ClassConditioning, Condition, TimeEmbedding
from elit.models.dit import DiT
from elit.models.interface import Core, Read
from elit.models.layers import Block, CrossAttention, Mlp, Modulation, layer_norm, modulate, sliceable
from elit.models.transformer import Streams
from elit.models.windows import InterfaceSpec, Shape, Windows

Convention = Literal["noise", "data", "ddpm"]
LATENT_POSITIONS = 4096  # rows of the latents' position table, more than any published size needs


class SiTBlock(Block):
    """A block without QK-norm; `rope` is None."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float):
        super().__init__(width, num_heads, mlp_ratio)
        self.attention.q_norm = self.attention.k_norm = nn.Identity()


class SiT(DiT):
    """SiT with adaLN-Zero; with `interface`, ELIT-SiT as published. Arguments as in DiT, and

    convention: time and output of the weights; a forward is the same with all three.
        "noise"    the noise level 1 − t, velocity: ELIT's published networks, and those made here
        "data"     t, velocity: the original SiT
        "ddpm"     one of DDPM's 1000 steps, noise: the original DiT; see `ddpm_time`
    """

    _no_split_modules: ClassVar = ["SiTBlock", "SiTInterface"]
    _repeated_blocks: ClassVar = ["SiTBlock"]
    block: ClassVar[type[Block]] = SiTBlock
    rotary: ClassVar[bool] = False
    reads_all: ClassVar[bool] = True

    @register_to_config
    def __init__(
        self,
        *,
        sample_size: int | Sequence[int] = 32,
        in_channels: int = 4,
        patch_size: int | Sequence[int] = 2,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        interface: InterfaceSpec | dict[str, Any] | None = None,
        convention: Convention = "noise",
        class_names: Sequence[str] | None = None,
    ):
        super(DiT, self).__init__()  # DiT's own would build its conditioning
        require(convention in get_args(Convention), "convention", convention, "noise, data or ddpm")
        self.build()

    def make_conditioning(self) -> ClassConditioning:
        config = self.config
        time = SiTTime(config.hidden_size, config.convention)
        return ClassConditioning(config.hidden_size, config.num_classes, config.class_names or (), time=time)

    @property
    def cell(self) -> Shape:
        return tuple(map(mul, self.patch_size, self.spec.window)) if self.spec else self.patch_size

    def token_grid(self, size: Sequence[int]) -> Shape:
        grid = super().token_grid(size)
        if self.spec:  # its latents have learned places in the whole image
            require(prod(grid) <= LATENT_POSITIONS, "sample_size", tuple(size), f"at most {LATENT_POSITIONS} tokens")
        return grid

    def check_sizes(self) -> None:
        super().check_sizes()
        require(len(self.patch_size) == 2, "sample_size", self.sample_size, "(rows, columns): SiT takes images")
        if self.spec:
            tokens = prod(self.spec.window)
            require(self.spec.num_latents == tokens, "num_latents", self.spec.num_latents, f"{tokens}, one a token")

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Condition,
        budget: Budget | Sequence[Budget] = None,
        *,
        share_head: bool = False,
        return_dict: bool = False,
    ) -> Any:
        """Velocity of x (B, C, H, W) at t, as in `Transformer.forward`."""
        if self.config.convention != "ddpm":
            return super().forward(x, t, y, budget, share_head=share_head, return_dict=return_dict)
        level = ddpm_time(t)[1].view(-1, 1, 1, 1)
        scaled = (x / (level**2 + (1 - level) ** 2).sqrt()).to(x.dtype)
        noise = super().forward(scaled, t, y, budget, share_head=share_head)
        x, level = (each.repeat(noise.shape[0] // x.shape[0], 1, 1, 1) for each in (x, level))
        velocity = ((x - noise) / level).to(x.dtype)
        return Transformer2DModelOutput(sample=velocity) if return_dict else velocity

    def embed(self, x: Tensor, windows: Windows) -> Tensor:
        s = super().embed(x, windows)
        return s + sincos_positions(windows.coordinates(), self.config.hidden_size).to(s.dtype)

    def rope(self, windows: Windows, budget: int | None = None) -> Any:
        return None

    def elastic_core(
        self, core: nn.ModuleList, budgets: Sequence[int], share_head: bool, windows: Windows, *streams: Tensor
    ) -> list[Tensor]:
        s, c = streams
        through = partial(super().elastic_core, core, budgets, share_head, windows)
        return [self.latent_interface(s, lambda latents: through(latents, c)[0], grid=windows, condition=c)]

    def run_core(
        self, core: nn.ModuleList, budget: int, windows: Windows, s: Tensor, c: Tensor, *aux: Tensor
    ) -> Streams:
        """s: all latents (B, G, J, d), of which the first J̃ of every window go through the core."""
        kept = s[:, :, :budget].flatten(1, 2).contiguous()  # (B, K, d); a view at J̃ = 1, one graph more
        kept, aux = self.run_blocks(core, kept, c, self.rope(windows), aux)
        return torch.cat((kept.unflatten(1, (-1, budget)), s[:, :, budget:]), 2), *aux

    def make_interface(self, width: int, num_heads: int, spec: InterfaceSpec) -> Any:
        return SiTInterface(width, num_heads, spec.num_latents)


class SiTTime(TimeEmbedding):
    """t as the weights were taught it."""

    def __init__(self, width: int, convention: Convention):
        super().__init__(width, scale=1.0)
        self.convention = convention

    def forward(self, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        if self.convention == "ddpm":
            return super().forward(ddpm_time(t)[0], dtype)
        return super().forward(t if self.convention == "data" else 1 - t, dtype)


class WidthNorm(nn.Module):
    """x / (rms(x) + 1e-5) · scale over the last axis: the small number stands outside the root."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        rms = wide.square().mean(-1, keepdim=True).sqrt()
        return (wide / (rms + 1e-5)).to(x.dtype) * self.scale.to(x.dtype)


class WideNormAttention(CrossAttention):
    """Cross-attention whose queries and keys are normalised over the whole width, before the split into heads."""

    def __init__(self, width: int, num_heads: int):
        super().__init__(width, num_heads)
        self.q_norm, self.k_norm = WidthNorm(width), WidthNorm(width)

    def project(self, queries: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = self.kv(context).chunk(2, -1)
        q = self.q_norm(self.q(queries)).expand(context.shape[0], -1, -1)  # or (1, Lq, d), of all groups alike
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in (q, self.k_norm(k), v))
        return q.to(v.dtype), k.to(v.dtype), v


class SiTRead(Read):
    """Read with adaLN-Zero on the tokens instead of the queries; its forward takes latents (J, d), tokens (B, N, d)."""

    def __init__(self, width: int, num_heads: int):
        nn.Module.__init__(self)  # the same names, other layers
        self.modulation = Modulation(width, 6)
        self.norm_tokens, self.norm_mlp = layer_norm(width), layer_norm(width)
        self.attention = WideNormAttention(width, num_heads)
        self.mlp = Mlp(width, width, bias=False)

    def inputs(self, latents: Tensor, tokens: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        context = modulate(self.norm_tokens(tokens), shift, scale).reshape(-1, *latents.shape)  # (B·G, n, d), n = J
        return sliceable(latents)[None], context


class SiTWrite(nn.Module):
    """s_ca = s + CA(s; latents), s_out = s_ca + MLP(s_ca): no norms, no adaLN."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.attention = WideNormAttention(width, num_heads)
        self.mlp = Mlp(width, width, bias=False)

    def forward(self, tokens: Tensor, latents: Tensor) -> Tensor:
        """tokens (B·G, n, d), latents (B·G, J, d) -> (B·G, n, d)."""
        x = tokens + self.attention(tokens, latents)
        return x + self.mlp(x)


class SiTInterface(nn.Module):
    """Latents, their positions and the tokens', and the two cross-attentions around the core."""

    def __init__(self, width: int, num_heads: int, num_latents: int):
        super().__init__()
        self.latents = nn.Parameter(torch.empty(num_latents, width))
        self.latent_position = nn.Parameter(torch.empty(LATENT_POSITIONS, width))  # raster order over the image
        # Positions in the window, before Read and before Write; both stay in the residual stream.
        self.position = nn.Parameter(torch.empty(num_latents, width))
        self.write_position = nn.Parameter(torch.empty(num_latents, width))
        self.reader = SiTRead(width, num_heads)
        self.writer = SiTWrite(width, num_heads)

    def initialize(self) -> None:
        for table in (self.latents, self.latent_position, self.position):
            nn.init.normal_(table, std=0.5)
        for table in (self.write_position, self.writer.attention.proj.weight, self.writer.mlp.fc2.weight):
            nn.init.zeros_(table)

    def forward(self, tokens: Tensor, core: Core, *, grid: Windows, condition: Tensor) -> Tensor:
        """Tokens (B, N, d) through Read, `core` and Write -> (B', N, d)."""
        (groups,) = grid.groups(tokens)  # (B·G, n, d)
        tokens = (groups + self.position.to(tokens.dtype)).view_as(tokens)
        latents = self.reader(self.latents.to(tokens.dtype), tokens, condition)  # (B, G·J, d)
        latents = latents + self.latent_position[grid.order].to(tokens.dtype)
        latents = core(latents.unflatten(1, (-1, len(self.latents))))  # (B', G, J, d)
        tokens = tokens.repeat(latents.shape[0] // tokens.shape[0], 1, 1)
        (groups,) = grid.groups(tokens)
        return self.writer(groups + self.write_position.to(tokens.dtype), latents.flatten(0, 1)).view_as(tokens)


def sincos_positions(positions: Tensor, width: int) -> Tensor:
    """Sines and cosines of the column, then of the row: positions (N, 2) -> (N, d), float32."""
    exponent = torch.arange(width // 4, device=positions.device, dtype=torch.float32) / (width // 4)
    row, column = (positions[:, None] * 10_000 ** -exponent[:, None]).unbind(-1)  # (N, d/4) each
    return torch.cat((column.sin(), column.cos(), row.sin(), row.cos()), -1)


def ddpm_time(t: Tensor) -> tuple[Tensor, Tensor]:
    """The step of DDPM that has the noise of t, and t as it can be told: (B,) -> (B,), (B,), float32."""
    betas = torch.linspace(1e-4, 0.02, 1000, device=t.device, dtype=torch.float32)
    log_signal = (1 - betas).log().cumsum(0)  # log α²
    alpha, sigma = (log_signal / 2).exp(), (-log_signal.expm1()).sqrt()
    times = (alpha / (alpha + sigma)).flip(0)  # of steps 999 to 0, ascending
    level = t.float().clamp(min=times[0])
    right = torch.searchsorted(times, level.contiguous()).clamp(1, 999)
    share = ((level - times[right - 1]) / (times[right] - times[right - 1])).clamp(0, 1)
    return 999 - (right - 1 + share), level
