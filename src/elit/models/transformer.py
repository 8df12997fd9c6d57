"""What all backbones share: head, Read, core, Write, tail (paper Figure 3), and the checks around them.

B batch, N spatial tokens, G groups, J̃ latents kept of a group, K = G·J̃, L tokens of any sequence, d width.
"""

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, ClassVar, Self, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor, nn

from elit.arguments import shortened
from elit.budgets import Budget, budget_block, budgets_of_samples, equal_parts, is_list, resolve_budget
from elit.compat import checkpoint_block, quiet_cast
from elit.models.conditioning import Condition
from elit.models.interface import InterfaceSpec, LatentInterface, latent_positions
from elit.models.layers import (
    FinalLayer,
    Rope,
    grid_positions,
    initialize,
    patchify,
    rope_tables,
    unpatchify,
)
from elit.models.layout import KINDS, Kind, Part, as_patch, as_size, divides, parts_of

AuxStreams = tuple[Tensor, ...]
"""What blocks hand on besides the tokens, batch first: a text stream, the outputs for long skips."""


class Transformer(ModelMixin, ConfigMixin, ABC):
    """A diffusion transformer with a compute dial; with `interface=None`, the same one without.

    A backbone says what its blocks are (`make_blocks`), how a stage of them runs (`run_blocks`) and how it is
    conditioned (`condition` and what has it in its name). Everything else is here.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["Block", "Read", "Write"]
    _repeated_blocks: ClassVar = ["Block"]
    kind: ClassVar[Kind] = KINDS["DiT"]
    """Where it differs from the others in sizes."""

    def build(
        self,
        *,
        sample_size: int | Sequence[int],
        in_channels: int,
        patch_size: int | Sequence[int],
        hidden_size: int,
        depth: int,
        num_heads: int,
        interface: InterfaceSpec | dict[str, Any] | None,
        conditioning: nn.Module,
    ) -> None:
        """The rest of every backbone's constructor. Raises ValueError where the sizes do not fit each other."""
        self.sample_size, self.patch_size = as_size(sample_size), as_patch(patch_size, sample_size)
        self.spec = InterfaceSpec.from_config(interface) if isinstance(interface, dict) else interface
        self.kind.check_sizes(self.sample_size, self.patch_size, hidden_size, num_heads, depth, self.spec)
        # What is saved is what JSON gives back, so a loaded config equals the one in memory.
        self.register_to_config(
            sample_size=as_json(sample_size),
            patch_size=as_json(patch_size),
            interface=self.spec and self.spec.to_config(),
        )

        patch_features = in_channels * torch.Size(self.patch_size).numel()
        self.patch_embed = nn.Linear(patch_features, hidden_size)
        self.conditioning = conditioning
        self.blocks = nn.ModuleList(self.make_blocks())
        self.final = FinalLayer(hidden_size, patch_features)
        self.latent_interface = self.make_interface(hidden_size, num_heads, self.spec) if self.spec else None
        self.gradient_checkpointing = False

        initialize(self)
        if self.latent_interface:
            self.latent_interface.initialize()

    @property
    def device(self) -> torch.device:
        """Of the weights, or that to which diffusers' offloading will bring them."""
        return super().device if _hooks_are_in_use() else next(self.parameters()).device

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As torch's own, and diffusers' where it has hooks in use or has quantized the weights."""
        if not (_hooks_are_in_use() or getattr(self, "is_quantized", False)):
            return cast(Self, nn.Module.to(self, *args, **kwargs))
        with quiet_cast():
            return super().to(*args, **kwargs)

    def to_json_string(self) -> str:
        """What config.json holds; without the folder that diffusers notes, which says nothing on another machine."""
        settings = json.loads(super().to_json_string())
        settings.pop("_name_or_path", None)
        return json.dumps(settings, indent=2, sort_keys=True) + "\n"

    @property
    def budget_step(self) -> int:
        """Budgets are multiples of this."""
        return self.kind.budget_step

    @property
    def takes_text(self) -> bool:
        """Whether its condition is a text: prompts or their embeddings, not labels."""
        return self.kind.takes_text

    @property
    def budgets(self) -> tuple[int, ...]:
        """Valid numbers of latents per group, ascending, the last one full; () for a baseline."""
        return tuple(range(self.budget_step, self.spec.num_latents + 1, self.budget_step)) if self.spec else ()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Condition,
        budget: Budget | Sequence[Budget] = None,
        *,
        branch_budgets: Sequence[Budget] | None = None,
        shared: bool = False,
    ) -> Tensor:
        """Velocity of x at t, (B, C, H, W) or (B, C, T, H, W) like x.

        x: noisy sample. t: (B,) in [0, 1], 0 = noise, 1 = data. y: (B,) integer labels, num_classes = null; for a
        text-conditional network its prompts, see there.
        budget: None = all latents, an int = latents kept per group, a float in (0, 1] = that share of them. A list has
        one a sample: head and tail run together, and the core once for each of the different budgets.
        branch_budgets: in the place of `budget`, one for each of equal parts of the batch, as guided sampling stacks
        its branches. shared: each of them is for the whole batch, whose head runs once: (budgets·B, C, ...) comes back,
        the batch at the first budget first. That is autoguidance.

        Raises ValueError for shapes and budgets that do not fit. Values of t and y are checked when they lie on
        the CPU; on a device that would be a sync, so check them before they go there.
        """
        self._check_inputs(x, t, y)
        counts = self._budgets(budget, branch_budgets, len(x), shared)
        size, window = x.shape[2:], self.window(x.shape[2:])
        grid = self.token_grid(size)
        rope = self.rope(grid, None, x)
        head, core, tail = self.stages()

        c, aux = self.condition(t, y)  # (B, d)
        s = self.patch_embed(patchify(x, self.patch_size, window))  # (B, N, d)
        s, aux = self.run_blocks(head, s, c, rope, aux)
        if (interface := self.latent_interface) is None:
            s, aux = self.run_blocks(core, s, c, rope, aux)
        else:

            def elastic_core(count: int, parts: Sequence[Tensor]) -> Sequence[Tensor]:
                s_i, c_i, *aux_i = parts
                shapes = self.parts(grid, count), window
                latents = interface.read(s_i, c_i, count, *shapes)  # (B, K, d)
                latents, after = self.run_blocks(core, latents, c_i, self.rope(grid, count, x), tuple(aux_i))
                return (interface.write(s_i, latents, *shapes), *after)  # (B, N, d)

            s, *rest = run_by_budget(elastic_core, counts, (s, c, *aux), shared=shared)
            c, aux = torch.cat([c] * len(counts)) if shared else c, tuple(rest)
        s, _ = self.run_blocks(tail, s, c, rope, aux)
        return unpatchify(self.final(s, c), size, self.patch_size, window)

    def condition(self, t: Tensor, y: Any) -> tuple[Tensor, AuxStreams]:
        """The conditioning (B, d) of a forward, and the auxiliary streams at the first block."""
        return self.conditioning(t, y), ()

    def time_embedding(self, t: Tensor) -> Tensor:
        """What the conditioning knows of times (B,), (B, d): how far it moves says how far the output may."""
        return self.conditioning.time(t)  # pyrefly: ignore[not-callable]

    def run_blocks(
        self, blocks: nn.ModuleList, x: Tensor, c: Tensor, rope: Rope, aux: AuxStreams
    ) -> tuple[Tensor, AuxStreams]:
        """One stage: x (B, L, d) through `blocks`, with its auxiliary streams."""
        for block in blocks:
            x = self.checkpointed_call(block, x, c, rope)
        return x, aux

    def checkpointed_call(self, block: nn.Module, *inputs: Any) -> Any:
        """`block(*inputs)`, recomputed in the backward pass where gradient checkpointing is on."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint_block(self, block, *inputs)
        return block(*inputs)

    @abstractmethod
    def make_blocks(self) -> list[nn.Module]:
        """All blocks, in order."""

    def make_interface(self, width: int, num_heads: int, spec: InterfaceSpec) -> Any:
        """Read and Write around the core, with an `initialize` of their own."""
        return LatentInterface(width, num_heads, torch.Size(spec.window).numel(), spec.num_latents)

    @abstractmethod
    def prepare_condition(self, y: Any) -> Any:
        """What a user hands in for a batch, as `y` of a forward on the CPU. Raises ValueError."""

    @abstractmethod
    def without_condition(self, y: Any, dropped: Tensor | None = None) -> Any:
        """y with the condition gone from the rows of `dropped` (B,) bool, by default from all: the null branch."""

    @abstractmethod
    def check_condition(self, y: Any, batch: int) -> None:
        """Raises ValueError where y does not fit a batch; looks at values only on the CPU."""

    @abstractmethod
    def example_condition(self, batch: int) -> Any:
        """Some y for a batch, on the CPU, as long as this network takes: for timing."""

    def stages(self) -> tuple[nn.ModuleList, nn.ModuleList, nn.ModuleList]:
        """The blocks of head, core and tail; a baseline is all core."""
        head, core, _ = self.spec.split if self.spec else (0, len(self.blocks), 0)
        return self.blocks[:head], self.blocks[head : head + core], self.blocks[head + core :]

    def token_grid(self, size: Sequence[int]) -> tuple[int, ...]:
        """Tokens along each axis of a sample of `size`. Raises ValueError naming the nearest sizes that work."""
        return self.kind.token_grid(size, self.patch_size, self.spec)

    def parts(self, grid: tuple[int, ...], num_latents: int) -> list[Part]:
        """The windows of a grid by shape, and the latents of each; none where all have the size they should."""
        if self.spec is None or divides(grid, self.spec.window):
            return []
        return parts_of(grid, self.spec.window, num_latents, self.budget_step)

    def window(self, size: Sequence[int]) -> tuple[int, ...]:
        """Tokens of a group along each axis."""
        return self.spec.window if self.spec else self.kind.plain_window(len(size)) or self.token_grid(size)

    def rope(self, grid: tuple[int, ...], num_latents: int | None, x: Tensor) -> Rope:
        """Rotary tables of the tokens of a grid or, with `num_latents`, of that many latents of each of its groups."""
        size = [length * p for length, p in zip(grid, self.patch_size, strict=True)]
        # What is made in a trace, or in inference mode, is of no use to other forwards.
        keeps = type(x) is Tensor and not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled()
        head_width = self.config.hidden_size // self.config.num_heads
        make = cached_tables if keeps else make_tables
        return make(grid, self.window(size), num_latents, self.budget_step, head_width, x.device)

    def _budgets(
        self,
        budget: Budget | Sequence[Budget],
        branch_budgets: Sequence[Budget] | None,
        batch: int,
        shared: bool,
    ) -> list[int]:
        """One budget for each of equal parts of the batch or, shared, for all of it. Raises ValueError."""
        if not torch.compiler.is_compiling() and budget_block.get() is not None and not hasattr(self, "elastic_record"):
            raise ValueError(
                "elit.budget: is for elastified transformers; give this network its budget as model(x, t, y, budget), "
                "elit.sample(..., budget=...) or pipe(..., budget=...)"
            )
        if branch_budgets is not None and not (budget is None and is_list(branch_budgets) and len(branch_budgets)):
            raise ValueError("budget, branch_budgets: give one of them; branch_budgets has a budget a branch")
        if not isinstance(shared, bool):
            raise ValueError(f"shared={shortened(shared)}: give True or False")
        if shared and branch_budgets is None:
            raise ValueError("shared=True: goes with branch_budgets")
        if branch_budgets is not None:
            counts = [resolve_budget(part, self.budgets) for part in branch_budgets]
        elif is_list(budget):
            counts = equal_parts(budgets_of_samples(cast(Sequence[Budget], budget), batch, self.budgets, "budget"))
        else:
            counts = [resolve_budget(cast(Budget, budget), self.budgets)]
        if shared:
            if not self.budgets:
                raise ValueError("shared=True: this model has no latent interface, so nothing differs after its head")
            return cast(list[int], counts)
        if all(count == counts[0] for count in counts[1:]):  # a set would hash them: a compilation for each
            counts = counts[:1]
        if batch % len(counts):
            raise ValueError(
                f"branch_budgets={branch_budgets!r}: {len(counts)} budgets do not divide a batch of {batch}"
            )
        return cast(list[int], counts)

    def _check_inputs(self, x: Tensor, t: Tensor, y: Any) -> None:
        axes, channels = len(self.patch_size), self.config.in_channels
        for name, value in (("x", x), ("t", t)):
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"{name}={shortened(value)}: give a tensor, {'(B, C, ...)' if name == 'x' else '(B,)'}"
                )
        if x.ndim != 2 + axes or x.shape[1] != channels:
            shape = ", ".join(["B", str(channels), *("T", "H", "W")[-axes:]])
            raise ValueError(f"x: shape {tuple(x.shape)}, expected ({shape})")
        if not len(x):
            raise ValueError("x: an empty batch; give at least one sample")
        own = self.patch_embed.weight.dtype
        if x.dtype != own and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
            raise ValueError(f"x: dtype {x.dtype}, and the network's is {own}; convert one of them with .to(...)")
        if t.shape != (len(x),):
            raise ValueError(f"t: shape {tuple(t.shape)}, expected ({len(x)},), one a sample")
        if on_cpu(t) and not ((t >= 0) & (t <= 1)).all():
            raise ValueError(f"t={t[~((t >= 0) & (t <= 1))][0].item():g}: times lie in [0, 1], 0 = noise, 1 = data")
        self.check_condition(y, len(x))


def _hooks_are_in_use() -> bool:
    """Whether any of diffusers' hooks can be on a network.

    To ask that itself, diffusers imports them all, with peft and transformers: seconds, in which a small network has
    drawn its pictures.
    """
    return "diffusers.hooks" in sys.modules


def run_by_budget(
    core: Callable[[int, Sequence[Tensor]], Sequence[Tensor]],
    counts: Sequence[int],
    inputs: Sequence[Tensor],
    *,
    shared: bool,
) -> list[Tensor]:
    """Runs `core` once for each of the different budgets; its outputs, batch first, in the order of the batch.

    counts: latents of a group for each of equal parts of the batch or, shared, each for all of it. inputs: tensors,
    batch first. core(count, inputs of the parts that have this count) -> tensors with as many rows.
    """
    parts = [[each] * len(counts) if shared else each.chunk(len(counts)) for each in inputs]
    ends: list[Sequence[Tensor]] = [()] * len(counts)
    for count, places in group_by_budget(counts):
        outputs = core(count, [joined([part[i] for i in places]) for part in parts])
        for i, *end in zip(places, *(each.chunk(len(places)) for each in outputs), strict=True):
            ends[i] = end
    return [joined(end) for end in zip(*ends, strict=True)]


def group_by_budget(counts: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Each different budget with the places that have it. Compares and hashes nothing: a budget may be symbolic."""
    groups: list[tuple[int, list[int]]] = []
    for place, count in enumerate(counts):
        places = next((places for known, places in groups if known == count), None)
        if places is None:
            groups.append((count, [place]))
        else:
            places.append(place)
    return groups


def joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def make_tables(
    grid: tuple[int, ...],
    window: tuple[int, ...],
    num_latents: int | None,
    step: int,
    head_width: int,
    device: torch.device,
) -> Rope:
    if num_latents is None:
        return rope_tables(grid_positions(grid, window, device), head_width)
    return rope_tables(latent_positions(grid, window, parts_of(grid, window, num_latents, step), device), head_width)


cached_tables = lru_cache(maxsize=128)(make_tables)


def on_cpu(value: Tensor) -> bool:
    """Whether values may be looked at: on a device that would be a sync, and a fake tensor has none."""
    return value.device.type == "cpu" and type(value) is Tensor and not torch.compiler.is_compiling()


def as_json(value: Any) -> int | list[int]:
    return list(map(int, value)) if is_list(value) else int(value)
