"""DiT and ELIT-DiT, class-conditional, for images (B, C, H, W) and video (B, C, T, H, W).

B batch, N spatial tokens, G groups, J̃ latents kept of a group, K = G·J̃, d width.
"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from elit.budgets import Budget, resolve_budget
from elit.models.interface import InterfaceSpec, LatentInterface, latent_positions
from elit.models.layers import (
    Block,
    ClassConditioning,
    FinalLayer,
    Rope,
    grid_positions,
    initialize,
    patchify,
    rope_tables,
    token_grid,
    unpatchify,
)


class DiT(ModelMixin, ConfigMixin):
    """Diffusion transformer with RoPE, QK-norm and adaLN-Zero; with `interface`, ELIT-DiT (paper section 3).

    sample_size: pixels or autoencoder cells along each axis, an int for square images, (T, H, W) for video.
    in_channels: C. patch_size: an int for all of (row, column), or one entry an axis.
    num_classes: classes; the label num_classes is the null class.
    interface: an `InterfaceSpec` (or its dict form); None is the plain baseline. Nothing else differs.

    Raises ValueError where the sizes do not fit each other.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["Block", "Read", "Write"]
    _repeated_blocks: ClassVar = ["Block"]

    @register_to_config
    def __init__(
        self,
        *,
        sample_size: int | Sequence[int] = 32,
        in_channels: int = 16,
        patch_size: int | Sequence[int] = 2,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        interface: InterfaceSpec | dict[str, Any] | None = None,
    ):
        super().__init__()
        self.sample_size, self.patch_size = as_size(sample_size), as_patch(patch_size, sample_size)
        self.spec = InterfaceSpec.from_config(interface) if isinstance(interface, dict) else interface
        self._check_sizes(hidden_size, num_heads, depth)
        # What is saved is what JSON gives back, so a loaded config equals the one in memory.
        self.register_to_config(
            sample_size=as_json(sample_size),
            patch_size=as_json(patch_size),
            interface=self.spec and self.spec.to_config(),
        )

        patch_features = in_channels * torch.Size(self.patch_size).numel()
        self.patch_embed = nn.Linear(patch_features, hidden_size)
        self.conditioning = ClassConditioning(hidden_size, num_classes)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final = FinalLayer(hidden_size, patch_features)
        self.latent_interface = None
        if self.spec:
            tokens_per_group = torch.Size(self.spec.window).numel()
            self.latent_interface = LatentInterface(hidden_size, num_heads, tokens_per_group, self.spec.num_latents)
        self.gradient_checkpointing = False

        initialize(self)
        if self.latent_interface:
            self.latent_interface.initialize()

    @property
    def budgets(self) -> tuple[int, ...]:
        """Valid numbers of latents per group, ascending, the last one full; () for a baseline."""
        return self.spec.budgets if self.spec else ()

    def forward(self, x: Tensor, t: Tensor, y: Tensor, budget: Budget | Sequence[Budget] = None) -> Tensor:
        """Velocity of x at t, (B, C, H, W) or (B, C, T, H, W) like x.

        x: noisy sample. t: (B,) in [0, 1], 0 = noise, 1 = data. y: (B,) integer labels, num_classes = null.
        budget: None = all latents, an int = latents kept per group, a float in (0, 1] = that share of them. A
        sequence of budgets gives each equal part of the batch its own: head and tail run together, cores apart.

        Raises ValueError for shapes and budgets that do not fit. Values of t and y are checked when they lie on
        the CPU; on a device that would be a sync, so check them before they go there.
        """
        self._check_inputs(x, t, y)
        parts = budget if isinstance(budget, (list, tuple)) else (budget,)
        kept = [resolve_budget(part, self.budgets) for part in parts]
        if len(kept) > 1 and len(set(kept)) == 1:
            kept = kept[:1]
        if len(x) % len(kept):
            raise ValueError(f"budget={budget!r}: {len(kept)} budgets do not divide a batch of {len(x)}")
        size, window = x.shape[2:], self.window(x.shape[2:])
        rope = self._rope(grid_positions(self.token_grid(size), window, x.device))
        head, core, tail = self.stages()

        c = self.conditioning(t, y)  # (B, d)
        s = self.patch_embed(patchify(x, self.patch_size, window))  # (B, N, d)
        s = self._run(head, s, c, rope)
        if self.latent_interface is None:
            s = self._run(core, s, c, rope)
        else:
            groups = [length // w for length, w in zip(self.token_grid(size), window, strict=True)]
            written = []
            for s_i, c_i, count in zip(s.chunk(len(kept)), c.chunk(len(kept)), cast(list[int], kept), strict=True):
                latents = self.latent_interface.read(s_i, c_i, count)  # (B, K, d)
                latents = self._run(core, latents, c_i, self._rope(latent_positions(groups, count, x.device)))
                written.append(self.latent_interface.write(s_i, latents))  # (B, N, d)
            s = torch.cat(written) if len(written) > 1 else written[0]
        s = self._run(tail, s, c, rope)
        return unpatchify(self.final(s, c), size, self.patch_size, window)

    def stages(self) -> tuple[nn.ModuleList, nn.ModuleList, nn.ModuleList]:
        """The blocks of head, core and tail; a baseline is all core."""
        head, core, _ = self.spec.split if self.spec else (0, len(self.blocks), 0)
        return self.blocks[:head], self.blocks[head : head + core], self.blocks[head + core :]

    def token_grid(self, size: Sequence[int]) -> tuple[int, ...]:
        """Tokens along each axis of a sample of `size`. Raises ValueError naming the nearest sizes that work."""
        return token_grid(size, self.patch_size, self.spec.window if self.spec else None)

    def window(self, size: Sequence[int]) -> tuple[int, ...]:
        """Tokens of a group along each axis; a baseline's one group is the whole grid."""
        return self.spec.window if self.spec else self.token_grid(size)

    def _run(self, blocks: Iterable[nn.Module], x: Tensor, c: Tensor, rope: Rope) -> Tensor:
        for block in blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, c, rope)
            else:
                x = block(x, c, rope)
        return x

    def _rope(self, positions: Tensor) -> Rope:
        return rope_tables(positions, self.config.hidden_size // self.config.num_heads)

    def _check_sizes(self, width: int, num_heads: int, depth: int) -> None:
        if width % num_heads or (width // num_heads) % 2:
            raise ValueError(f"hidden_size={width}, num_heads={num_heads}: need an even hidden_size / num_heads")
        axes = len(self.patch_size)
        if len(self.sample_size) != axes:
            raise ValueError(f"sample_size={self.sample_size}, patch_size={self.patch_size}: need as many entries")
        if self.spec is None:
            self.token_grid(self.sample_size)
            return
        if len(self.spec.window) != axes:
            raise ValueError(f"window={self.spec.window}: need {axes} entries, like patch_size={self.patch_size}")
        if sum(self.spec.split) != depth:
            raise ValueError(f"split={self.spec.split}: head, core and tail must sum to depth={depth}")
        if width // num_heads < 2 * (axes + 1):
            raise ValueError(f"num_heads={num_heads}: a head must be at least {2 * (axes + 1)} wide for RoPE")
        self.token_grid(self.sample_size)

    def _check_inputs(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        axes, channels = len(self.patch_size), self.config.in_channels
        if x.ndim != 2 + axes or x.shape[1] != channels:
            shape = ", ".join(["B", str(channels), *("T", "H", "W")[-axes:]])
            raise ValueError(f"x: shape {tuple(x.shape)}, expected ({shape})")
        for name, value in (("t", t), ("y", y)):
            if value.shape != (len(x),):
                raise ValueError(f"{name}: shape {tuple(value.shape)}, expected ({len(x)},), one a sample")
        if not torch.compiler.is_compiling() and t.device.type == y.device.type == "cpu":
            check_values(t, y, self.config.num_classes)


def check_values(t: Tensor | None, y: Tensor, num_classes: int) -> None:
    """Raises ValueError where a time lies outside [0, 1] or a label outside [0, num_classes]."""
    if t is not None and not ((t >= 0) & (t <= 1)).all():
        raise ValueError(f"t={t[~((t >= 0) & (t <= 1))][0].item():g}: times lie in [0, 1], 0 = noise, 1 = data")
    if y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(f"y: dtype {y.dtype}, expected integer labels")
    if not ((y >= 0) & (y <= num_classes)).all():
        wrong = y[(y < 0) | (y > num_classes)][0].item()
        raise ValueError(f"y={wrong}: labels are 0 to {num_classes - 1}, and {num_classes} for no class")


def as_size(sample_size: int | Sequence[int]) -> tuple[int, ...]:
    """An int is a square image."""
    return (sample_size,) * 2 if isinstance(sample_size, int) else tuple(sample_size)


def as_patch(patch_size: int | Sequence[int], sample_size: int | Sequence[int]) -> tuple[int, ...]:
    """An int is that many rows and columns, and one frame of a video."""
    if not isinstance(patch_size, int):
        return tuple(patch_size)
    return (1,) * (len(as_size(sample_size)) - 2) + (patch_size, patch_size)


def as_json(value: int | Sequence[int]) -> int | list[int]:
    return value if isinstance(value, int) else list(value)
