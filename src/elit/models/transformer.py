"""Parts that all backbones share: head, Read, core, Write, tail (paper Figure 3), and the checks around them.

B batch, N spatial tokens, G windows, J̃ latents kept of a window, K = G·J̃, L tokens of any sequence, d width.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from elit.budgets import Budget, budget_block, equal_parts, is_list, resolve_budget
from elit.compat import CHECKPOINT_FUNCTION, forward_device
from elit.config import require
from elit.files import Json, write_text
from elit.models.conditioning import Condition, on_cpu
from elit.models.interface import LatentInterface
from elit.models.layers import FinalLayer, Rope, initialize, patchify, rope_tables, unpatchify
from elit.models.windows import InterfaceSpec, Shape, Windows, as_patch, as_size, cut, joined, remembered, windows_of

Streams = tuple[Tensor, ...]  # streams beside the tokens, batch first: a text stream, the outputs for long skips

# Settings that are numbers, and the least that each may be.
LEAST = {"in_channels": 1, "hidden_size": 1, "depth": 1, "num_heads": 1, "num_classes": 1, "mlp_ratio": 1e-3}
LEAST |= {"text_features": 1, "text_length": 1, "pooled_features": 0}


class Transformer(PeftAdapterMixin, ModelMixin, ConfigMixin, ABC):
    """A diffusion transformer with a compute dial; with `interface=None`, the same one without.

    A backbone defines its blocks (`make_blocks`), how a stage of them runs (`run_blocks`) and how it is conditioned
    (`make_conditioning`). Everything else is here.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["Block", "LatentInterface"]
    _repeated_blocks: ClassVar = ["Block"]
    budget_step: ClassVar[int] = 1  # budgets are multiples of this
    takes_text: ClassVar[bool] = False  # conditions are prompts or their embeddings, not labels
    rotary: ClassVar[bool] = True  # positions are RoPE, for which a head must be wide enough
    reads_all: ClassVar[bool] = False  # Read and Write take all latents whatever the budget, the core alone drops some

    def build(self) -> None:
        """The rest of every backbone's constructor. Raises ValueError where the sizes do not fit each other."""
        config, interface, width = self.config, self.config.interface, self.config.hidden_size
        self.sample_size = as_size(config.sample_size)
        self.patch_size = as_patch(config.patch_size, config.sample_size)
        self.spec = InterfaceSpec(**interface) if isinstance(interface, dict) else interface
        self.check_sizes()
        sizes = {"sample_size": config.sample_size, "patch_size": config.patch_size}
        # As JSON reads it back, so that a loaded config equals the one in memory.
        sizes = {name: value if isinstance(value, int) else list(value) for name, value in sizes.items()}
        self.register_to_config(**sizes, interface=self.spec and self.spec.to_config())

        patch_features = config.in_channels * prod(self.patch_size)
        conditioning = self.make_conditioning()
        self.patch_embed = nn.Linear(patch_features, width)
        self.conditioning: Any = conditioning
        self.blocks = nn.ModuleList(self.make_blocks())
        self.final = FinalLayer(width, patch_features)
        self.latent_interface: Any = self.make_interface(width, config.num_heads, self.spec) if self.spec else None
        self.gradient_checkpointing = False

        initialize(self)
        if self.latent_interface:
            self.latent_interface.initialize()

    @property
    def device(self) -> torch.device:
        """Device of the weights, or the one that diffusers' or accelerate's offloading moves them to."""
        own = super().device
        return forward_device(self) if own.type == "meta" else own

    def save_config(self, save_directory: str | Path, *args: object, **kwargs: object) -> None:
        """config.json, and the module beside it in which diffusers' AutoModel finds the class."""
        module, name = type(self).__module__, type(self).__name__
        write_text(Path(save_directory) / "elit_network.py", f"from {module} import {name} as {name}\n")
        super().save_config(save_directory, *args, **kwargs)

    @classmethod
    def extract_init_dict(cls, config_dict: Json, **kwargs: object) -> object:
        return super().extract_init_dict({key: config_dict[key] for key in config_dict if key != "auto_map"}, **kwargs)

    def to_json_string(self) -> str:
        """Content of config.json, without the local folder that diffusers adds."""
        settings = json.loads(super().to_json_string())
        settings["auto_map"] = {"AutoModel": f"elit_network.{type(self).__name__}"}
        settings.pop("_name_or_path", None)
        return json.dumps(settings, indent=2, sort_keys=True) + "\n"

    def set_attention_backend(self, backend: str) -> None:
        require(backend.lower() == "native", "backend", backend, "native; torch.nn.attention.sdpa_kernel sets kernels")

    @property
    def budgets(self) -> tuple[int, ...]:
        """Valid numbers of latents per window, ascending, the last one full; () for a baseline."""
        return tuple(range(self.budget_step, self.spec.num_latents + 1, self.budget_step)) if self.spec else ()

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
        """Velocity of x at t, (B, C, H, W) or (B, C, T, H, W) like x.

        x: noisy sample. t: (B,) in [0, 1], 0 = noise, 1 = data. y: (B,) integer labels, num_classes = null, or as a
        text-conditional network says. budget: None = all latents, an int = latents kept per window, a float in (0, 1] =
        that share of them; or a list for equal parts of the batch: head and tail run together, and the core once for
        each of the different budgets. share_head: each budget is for the whole batch, whose head runs once, as in
        autoguidance: (budgets·B, C, ...), the batch at the first budget first. return_dict: gives a diffusers output.

        Raises ValueError for what does not fit. Values of t and y are checked on the CPU alone: elsewhere it is a sync.
        """
        self.check_inputs(x, t, y)
        budgets = self.checked_budgets(budget, x.shape[0], share_head)
        windows = self.windows(x.shape[2:], x)
        rope = self.rope(windows)
        head, core, tail = self.stages()

        c, *aux = self.conditioning(t, y, x.dtype)  # (B, d)
        s = self.embed(x, windows)  # (B, N, d)
        s, aux = self.run_blocks(head, s, c, rope, tuple(aux))
        if self.latent_interface is None:
            s, aux = self.run_blocks(core, s, c, rope, aux)
        else:
            s, *aux = self.elastic_core(core, budgets, share_head, windows, s, c, *aux)
            c = torch.cat([c] * len(budgets)) if share_head else c
        s, _ = self.run_blocks(tail, s, c, rope, tuple(aux))
        velocity = unpatchify(self.final(s, c), self.patch_size, windows)
        return Transformer2DModelOutput(sample=velocity) if return_dict else velocity

    def elastic_core(
        self, core: nn.ModuleList, budgets: Sequence[int], share_head: bool, windows: Windows, *streams: Tensor
    ) -> list[Tensor]:
        """Read, core, Write of equal parts of the batch, each at its budget; streams: s (B, N, d), c (B, d), others."""
        count = len(budgets)
        parts = list(zip(*([each] * count if share_head else cut(each, count) for each in streams), strict=True))
        outputs: list[Sequence[Tensor]] = [()] * count
        for first, budget in enumerate(budgets):
            rows = [row for row, other in enumerate(budgets) if other == budget]
            if first == rows[0]:
                s, c, *aux = map(joined, zip(*(parts[row] for row in rows), strict=True))
                together = self.run_core(core, budget, windows, s, c, *aux)
                for row, *output in zip(rows, *(cut(each, len(rows)) for each in together), strict=True):
                    outputs[row] = output
        return [joined(each) for each in zip(*outputs, strict=True)]

    def run_core(
        self, core: nn.ModuleList, budget: int, windows: Windows, s: Tensor, c: Tensor, *aux: Tensor
    ) -> Streams:
        def through(latents: Tensor) -> Tensor:  # (B, K, d)
            nonlocal aux
            latents, aux = self.run_blocks(core, latents, c, self.rope(windows, budget), aux)
            return latents

        return self.latent_interface(s, through, grid=windows, condition=c, budget=budget), *aux

    def embed(self, x: Tensor, windows: Windows) -> Tensor:
        """Tokens (B, N, d) of a sample, window by window."""
        return self.patch_embed(patchify(x, self.patch_size, windows))

    def run_blocks(
        self, blocks: nn.ModuleList, x: Tensor, c: Tensor, rope: Rope, aux: Streams
    ) -> tuple[Tensor, Streams]:
        """One stage: x (B, L, d) through `blocks`, with its auxiliary streams."""
        for block in blocks:
            x = self.checkpointed_call(block, x, c, rope)
        return x, aux

    def checkpointed_call(self, block: nn.Module, *inputs: Any) -> Any:
        """`block(*inputs)`, recomputed in the backward pass where gradient checkpointing is on."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return getattr(self, CHECKPOINT_FUNCTION)(block, *inputs)
        return block(*inputs)

    @staticmethod
    def default_split(depth: int) -> tuple[int, int, int]:
        """About 70% of the blocks in the core, which the paper finds best (Table 4b)."""
        outer = max(1, round(0.15 * depth)) if depth >= 3 else 0
        return outer, depth - 2 * outer, outer

    @abstractmethod
    def make_blocks(self) -> list[nn.Module]:
        """All blocks, in order."""

    @abstractmethod
    def make_conditioning(self) -> nn.Module:
        """Like `ClassConditioning`: of t and y, the conditioning (B, d), then the auxiliary streams."""

    def make_interface(self, width: int, num_heads: int, spec: InterfaceSpec) -> Any:
        return LatentInterface(width, num_heads, spec.window, spec.num_latents, condition_width=width)

    def stages(self) -> tuple[nn.ModuleList, nn.ModuleList, nn.ModuleList]:
        """The blocks of head, core and tail; a baseline is all core."""
        head, core, _ = self.spec.split if self.spec else (0, len(self.blocks), 0)
        return self.blocks[:head], self.blocks[head : head + core], self.blocks[head + core :]

    def token_grid(self, size: Sequence[int]) -> Shape:
        """Tokens along each axis of a sample of `size`. Raises ValueError naming the nearest sizes that work."""
        cell = self.cell
        require(len(size) == len(cell), "sample_size", tuple(size), f"{len(cell)} numbers, as many as patch_size has")
        if any(length < step or length % step for length, step in zip(size, cell, strict=True)):
            near = [{max(1, n // step) * step, -(-n // step) * step} for n, step in zip(size, cell, strict=True)]
            valid = " × ".join(" or ".join(map(str, sorted(choices))) for choices in near)
            multiple = "×".join(map(str, cell))
            require(False, "sample_size", tuple(size), f"a multiple of {multiple} (nearest valid: {valid})")
        return tuple(length // p for length, p in zip(size, self.patch_size, strict=True))

    def window(self, size: Sequence[int]) -> Shape:
        """Tokens of a full window along each axis; a baseline's tokens are one window."""
        return self.spec.window if self.spec else self.token_grid(size)

    @property
    def cell(self) -> Shape:
        """Lengths that a sample is a multiple of along each axis."""
        return self.patch_size

    def windows(self, size: Sequence[int], like: Tensor) -> Windows:
        """Windows of samples of `size`, on the device of `like`. Raises ValueError naming the nearest valid sizes."""
        return windows_of(self.token_grid(size), self.window(size), self.budget_step, like.device)

    def rope(self, windows: Windows, budget: int | None = None) -> Rope:
        """Rotary tables of the tokens or, with a budget, of the latents."""
        return rope_of(windows, budget, self.config.hidden_size // self.config.num_heads)

    def checked_budgets(self, budget: Budget | Sequence[Budget], batch: int, share_head: bool) -> Sequence[int]:
        """One budget for each of equal parts of the batch or, with a shared head, for all of it. Raises ValueError."""
        if not torch.compiler.is_compiling() and budget_block.get() is not None and not hasattr(self, "elastic_record"):
            raise ValueError("cannot use elit.budget here: this network takes its budget as an argument")
        if share_head and not (self.budgets and is_list(budget)):
            raise ValueError("share_head must go with a list of budgets of a model with a latent interface")
        values: Any = budget if is_list(budget) else [budget]
        budgets = [resolve_budget(value, self.budgets) for value in values]
        parts: Any = budgets if share_head else equal_parts(budgets)
        if not share_head and (not parts or batch % len(parts)):
            raise ValueError(f"budget must be a list that divides a batch of {batch}, got {len(parts)} budgets")
        return parts

    def check_sizes(self) -> None:
        """Raises ValueError where width, heads, depth, patch, window and split do not fit each other."""
        for name, least in LEAST.items():
            value = self.config.get(name, least)
            require(least <= value <= 1 << 20, name, value, f"{least} to {1 << 20}")
        width, heads, axes, spec = self.config.hidden_size, self.config.num_heads, len(self.patch_size), self.spec
        even = 2 if self.rotary else 1
        require(width % (even * heads) == 0, "hidden_size", width, f"a multiple of {even} · num_heads = {even * heads}")
        if spec is not None:
            require(len(spec.window) == axes, "window", spec.window, f"{axes} numbers, as many as patch_size has")
            require(sum(spec.split) == self.config.depth, "split", spec.split, f"{self.config.depth} = depth in all")
            wide = not self.rotary or width // heads >= 2 * (axes + 1)
            require(wide, "num_heads", heads, f"at most {width // (2 * (axes + 1))}, for heads of {2 * (axes + 1)}")
            step = self.budget_step
            require(spec.num_latents % step == 0, "num_latents", spec.num_latents, f"a multiple of {step}")
        self.token_grid(self.sample_size)

    def check_inputs(self, x: Tensor, t: Tensor, y: Condition) -> None:
        """Raises ValueError for what does not fit the network or each other."""
        axes, channels = len(self.patch_size), self.config.in_channels
        if x.ndim != 2 + axes or x.shape[1] != channels or not x.shape[0]:
            sides = ", ".join(("T", "H", "W")[-axes:])
            raise ValueError(f"x must be (B, {channels}, {sides}) with B at least 1, got {tuple(x.shape)}")
        if t.shape != (x.shape[0],):
            raise ValueError(f"t must be ({x.shape[0]},), one time a sample, got {tuple(t.shape)}")
        if on_cpu(t) and not ((t >= 0) & (t <= 1)).all():
            raise ValueError(f"t must be 0 (noise) to 1 (data), got {t.tolist()}")
        self.conditioning.check(y, x.shape[0])


@remembered
def rope_of(windows: Windows, budget: int | None, head_width: int) -> Rope:
    return rope_tables(windows.coordinates(budget), head_width)
