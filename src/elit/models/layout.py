"""Settings of a network: kinds of networks, token grid, stages."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

from elit.arguments import whole_number, whole_numbers
from elit.budgets import is_list
from elit.models.windows import Shape

MERGED = 4  # HDiT: tokens in one, 2×2 neighbours or 4 latents of one group
CHARACTERS = "characters"  # the built-in text encoder's name in configs, beside those of the Hugging Face hub
TIME_FREQUENCIES = 256  # of the sinusoid that the time is embedded by
CHARACTER_BLOCKS = 2  # of that encoder
LATENT_POSITIONS = 4096  # SiT: rows of the latents' position table, more than any published size needs


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What tells the classes of networks apart where only sizes matter; a class has its own as `kind`."""

    name: str
    """Of the class."""
    defaults: Mapping[str, Any] = field(repr=False)
    """Arguments of its constructor, `interface` left out."""
    budget_step: int = 1
    """Budgets are multiples of this."""
    takes_text: bool = False
    """Whether its condition is a text: prompts or their embeddings, not labels."""
    rotary: bool = True
    """Whether positions are RoPE, for which a head must be wide enough."""

    def plain_window(self, axes: int) -> Shape | None:
        """The window in which a baseline sorts its tokens; None = the whole grid is one."""
        return (1,) * (axes - 2) + (2, 2) if self.name == "HDiT" else None

    def whole_windows(self, spec: "InterfaceSpec | None", axes: int) -> Shape | None:
        """The window that a grid must divide into; None = any grid will do, smaller windows make up the rest."""
        if spec is None:
            return self.plain_window(axes)
        return spec.window if self.name == "SiT" else None  # SiT's latents have learned places in the whole image

    def cell(self, patch: Sequence[int], spec: "InterfaceSpec | None") -> Shape:
        """What the length of a sample along each axis must be a multiple of."""
        return cell_of(patch, self.whole_windows(spec, len(patch)))

    def token_grid(self, size: Sequence[int], patch: Sequence[int], spec: "InterfaceSpec | None") -> Shape:
        """Tokens along each axis of a sample of `size`. Raises ValueError naming the nearest sizes that work."""
        grid = token_grid(size, patch, self.whole_windows(spec, len(size)))
        if self.name == "SiT" and spec and prod(grid) > LATENT_POSITIONS:
            raise ValueError(
                f"sample_size={tuple(size)}: {prod(grid)} tokens, and ELIT-SiT has positions for "
                f"{LATENT_POSITIONS} latents; give a smaller one, or larger patches"
            )
        return grid

    def check_sizes(
        self, size: Shape, patch: Shape, width: int, num_heads: int, depth: int, spec: "InterfaceSpec | None"
    ) -> None:
        """Raises ValueError where width, heads, depth, patch, window and split do not fit each other."""
        if width % num_heads or (self.rotary and (width // num_heads) % 2):
            need = "an even" if self.rotary else "a whole"
            raise ValueError(f"hidden_size={width}, num_heads={num_heads}: need {need} hidden_size / num_heads")
        axes = len(patch)
        if len(size) != axes:
            raise ValueError(f"sample_size={size}, patch_size={patch}: need as many entries")
        if spec is not None:
            self._check_interface(spec, patch, width, num_heads, depth)
        self.token_grid(size, patch, spec)
        if self.name == "HDiT":
            wide = merged_blocks(depth)
            head, core, _ = spec.split if spec else (0, depth, 0)
            if not head <= wide.start < wide.stop <= head + core:
                raise ValueError(
                    f"split={spec and spec.split}: at depth {depth} HDiT merges after block {wide.start} and splits "
                    f"after block {wide.stop}; both must lie in the core"
                )
        if self.name == "SiT":
            if axes != 2:
                raise ValueError(f"sample_size={size}: SiT takes images, (rows, columns)")
            if width % 4:
                raise ValueError(f"hidden_size={width}: need a multiple of 4 for sin-cos positions")

    def _check_interface(self, spec: "InterfaceSpec", patch: Shape, width: int, num_heads: int, depth: int) -> None:
        axes = len(patch)
        if len(spec.window) != axes:
            raise ValueError(f"window={spec.window}: need {axes} entries, like patch_size={patch}")
        if sum(spec.split) != depth:
            raise ValueError(f"split={spec.split}: head, core and tail must sum to depth={depth}")
        if self.rotary and width // num_heads < 2 * (axes + 1):
            raise ValueError(f"num_heads={num_heads}: a head must be at least {2 * (axes + 1)} wide for RoPE")
        if spec.num_latents % self.budget_step:
            raise ValueError(f"num_latents={spec.num_latents}: {self.name} needs a multiple of {self.budget_step}")
        if self.name == "SiT" and spec.num_latents != prod(spec.window):
            raise ValueError(f"num_latents={spec.num_latents}: SiT has one a token of window={spec.window}")


_SIZES = {"sample_size": 32, "in_channels": 16, "patch_size": 2, "hidden_size": 1152, "depth": 28, "num_heads": 16}
_CLASSES = _SIZES | {"mlp_ratio": 4.0, "num_classes": 1000}
_TEXT = {"text_encoder": CHARACTERS, "text_features": 256, "text_length": 64, "pooled_features": 256}
KINDS = {
    kind.name: kind
    for kind in (
        Kind(name="DiT", defaults=_CLASSES | {"class_names": None}),
        Kind(name="UViT", defaults=_CLASSES | {"class_names": None}),
        Kind(name="HDiT", defaults=_CLASSES | {"class_names": None}, budget_step=MERGED),
        Kind(name="MMDiT", defaults=_SIZES | {"mlp_ratio": 4.0} | _TEXT, takes_text=True),
        Kind(
            name="SiT",
            defaults=_CLASSES | {"in_channels": 4, "convention": "noise", "class_names": None},
            rotary=False,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class InterfaceSpec:
    """Where the interface sits and how large it is."""

    split: tuple[int, int, int]
    """Blocks in the head (spatial tokens), the core (latents) and the tail (spatial tokens)."""
    window: tuple[int, ...]
    """Spatial tokens of a group along each axis, (rows, columns) or (frames, rows, columns)."""
    num_latents: int
    """J, latents of a group at full budget."""

    def __post_init__(self) -> None:
        for name, example in (("split", "(4, 20, 4)"), ("window", "(4, 4)")):
            object.__setattr__(self, name, whole_numbers(name, getattr(self, name), example, least=0))
        object.__setattr__(self, "num_latents", whole_number("num_latents", self.num_latents, 1))
        if len(self.split) != 3 or min(self.split) < 0 or self.split[1] < 1:
            raise ValueError(f"split={self.split}: give (head, core, tail) block counts with at least 1 in the core")
        if min(self.window, default=0) < 1:
            raise ValueError(f"window={self.window}: give at least 1 token along each axis")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "InterfaceSpec":
        return cls(split=config["split"], window=config["window"], num_latents=config["num_latents"])

    def to_config(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def as_size(sample_size: int | Sequence[int]) -> Shape:
    """An int is a square image. Raises ValueError for what is no size."""
    if is_list(sample_size) or isinstance(sample_size, str):
        return whole_numbers("sample_size", sample_size, "(32, 32)")
    return (whole_number("sample_size", sample_size, 1),) * 2


def as_patch(patch_size: int | Sequence[int], sample_size: int | Sequence[int]) -> Shape:
    """An int is that many rows and columns, and one frame of a video. Raises ValueError for what is no size."""
    if is_list(patch_size) or isinstance(patch_size, str):
        return whole_numbers("patch_size", patch_size, "(2, 2)")
    return (1,) * (len(as_size(sample_size)) - 2) + (whole_number("patch_size", patch_size, 1),) * 2


def cell_of(patch: Sequence[int], window: Sequence[int] | None) -> Shape:
    return tuple(p * w for p, w in zip(patch, window or (1,) * len(patch), strict=True))


def nearest(length: int, step: int) -> list[int]:
    """The multiples of `step` beside a length, one where it is a multiple itself."""
    return sorted({max(step, length // step * step), max(step, -(-length // step) * step)})


def token_grid(size: Sequence[int], patch: Sequence[int], window: Sequence[int] | None) -> tuple[int, ...]:
    """Tokens along each axis of a sample. Raises ValueError, naming the nearest sizes, where they do not divide."""
    if min(patch) < 1:
        raise ValueError(f"patch_size={tuple(patch)}: give at least 1 along each axis")
    cell = cell_of(patch, window)
    if len(size) != len(patch):
        raise ValueError(f"sample_size={tuple(size)}: expected {len(patch)} entries")
    if any(length < step or length % step for length, step in zip(size, cell, strict=True)):
        near = [nearest(length, step) for length, step in zip(size, cell, strict=True)]
        windows = f" and windows of {'×'.join(map(str, window))} tokens" if window else ""
        valid = " × ".join(" or ".join(map(str, choices)) for choices in near)
        raise ValueError(
            f"sample_size={tuple(size)}: patches of {'×'.join(map(str, patch))}{windows} need multiples of "
            f"{'×'.join(map(str, cell))}; nearest valid: {valid}"
        )
    return tuple(length // p for length, p in zip(size, patch, strict=True))


def merged_blocks(depth: int) -> range:
    """The blocks that work on merged tokens: 8 to 19 of 28, and in proportion."""
    outer = min(round(depth * 8 / 28), (depth - 1) // 2)
    return range(outer, depth - outer)


def skip_pairs(depth: int, split: Sequence[int] | None) -> dict[int, int]:
    """{block: the later block that its output skips to}, for a baseline or the split of an ELIT network."""
    head, core, tail = split or (0, depth, 0)
    outer = {head - 1 - i: head + core + i for i in range(min(head, tail))}
    return outer | {head + i: head + core - 1 - i for i in range((core - 1) // 2)}
