"""Conditions of a network beside the noisy sample: the time, and a class or a text.

B batch, d width, M tokens of a text, F their features, P pooled features.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor, nn

from elit.config import require
from elit.models.layers import Mlp, SelfAttention, layer_norm, rope_tables

CHARACTERS = "characters"  # name of the built-in text encoder in configs, beside those of the Hugging Face hub


class TimeEmbedding(TimestepEmbedding):
    """t (B,) in [0, 1] -> (B, d): sinusoid of `scale`·t, linear, SiLU, linear."""

    frequencies = 256

    def __init__(self, width: int, scale: float = 1000.0):
        super().__init__(self.frequencies, width)
        self.scale = scale

    def forward(self, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """dtype: that the network computes in, which its weights may be stored without; default theirs."""
        sinusoid = get_timestep_embedding(
            self.scale * t.float(), self.frequencies, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        return super().forward(sinusoid.to(dtype or self.linear_1.weight.dtype))


@dataclass(frozen=True)
class Text:
    """Encoded prompts, the `y` of a text-conditional network."""

    embeddings: Tensor  # (B, M, F) floating point, one vector a token.
    mask: Tensor  # (B, M) bool, False where a prompt is padded; a row of False is no text, the unconditional branch.
    pooled: Tensor | None = None  # (B, P), one vector a prompt; None = the mean of its tokens, where it is wanted.

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, rows: slice | Tensor) -> "Text":
        return Text(self.embeddings[rows], self.mask[rows], None if self.pooled is None else self.pooled[rows])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Text":
        parts = {name: part for name, part in vars(self).items() if part is not None}
        return Text(**{name: part.to(device, non_blocking=non_blocking) for name, part in parts.items()})

    def pin_memory(self) -> "Text":
        """As torch's loaders ask for, so that `to` need not wait."""
        return Text(**{name: part.pin_memory() for name, part in vars(self).items() if part is not None})


Condition = Tensor | Text  # y of a forward: labels, characters or embeddings


def concatenate(parts: Sequence[Condition]) -> Condition:
    """Conditions of several batches, all of one kind, as those of one."""
    texts = [part for part in parts if isinstance(part, Text)]
    if not texts:
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    pooled = [part.pooled for part in texts if part.pooled is not None]
    embeddings, mask = torch.cat([part.embeddings for part in texts]), torch.cat([part.mask for part in texts])
    return Text(embeddings, mask, torch.cat(pooled) if pooled else None)


def on_cpu(value: Tensor) -> bool:
    """True where values can be read: on a device that would be a sync, and a fake tensor has none."""
    return value.device.type == "cpu" and type(value) is Tensor and not torch.compiler.is_compiling()


class ClassConditioning(nn.Module):
    """t (B,) in [0, 1] and class y (B,) -> conditioning (B, d); y = num_classes is the null class."""

    def __init__(
        self, width: int, num_classes: int, class_names: Sequence[str] = (), *, time: TimeEmbedding | None = None
    ):
        super().__init__()
        self.num_classes, self.class_names = num_classes, tuple(class_names)
        self.time = TimeEmbedding(width) if time is None else time
        self.label = nn.Embedding(num_classes + 1, width)

    def forward(self, t: Tensor, y: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor]:
        return (self.time(t, dtype) + self.label(y.long()),)

    def prepare(self, y: Tensor | Sequence[int | str] | int | str) -> Tensor:
        """Labels or names of classes, one or several, as (B,) integers on the CPU. Raises ValueError."""
        y = [y] if isinstance(y, str | int) else y
        if not isinstance(y, Tensor):
            y = torch.as_tensor(class_numbers(y, self.class_names, self.num_classes))
        y = y.cpu()  # where its values can be checked
        require(y.ndim == 1 and len(y) > 0, "y", tuple(y.shape), "at least one label")
        self.check(y, len(y))
        return y.long()

    def check(self, y: Tensor, batch: int) -> None:
        """Raises ValueError where y does not fit a batch; looks at values only on the CPU."""
        classes = self.num_classes
        if y.shape != (batch,) or y.is_floating_point():
            raise ValueError(f"y must be ({batch},) integer labels, one a sample, got {y.dtype} {tuple(y.shape)}")
        if on_cpu(y) and not ((y >= 0) & (y <= classes)).all():
            raise ValueError(f"y must be labels 0 to {classes - 1}, or {classes} for no class, got {y.tolist()}")

    def without(self, y: Tensor, dropped: Tensor | None = None) -> Tensor:
        """y with the null class in the rows of `dropped` (B,) bool, by default in all."""
        null = torch.full_like(y, self.num_classes, dtype=torch.int64)
        return null if dropped is None else torch.where(dropped, null, y)

    def example(self, batch: int) -> Tensor:
        return torch.arange(batch) % self.num_classes


def recognised(names: Sequence[str]) -> list[int]:
    """Classes as a classifier counts them: by their names where all are numbers, such as "3" and "7", else in order."""
    return [int(name) for name in names] if all(map(str.isdecimal, names)) else list(range(len(names)))


def class_numbers(labels: Sequence[int | str], names: Sequence[str], num_classes: int) -> list[int]:
    """Numbers of classes given by name, in any spelling, or number (3, or "3" unless all names are numbers)."""

    def plain(name: str) -> str:
        name = " ".join(re.split(r"[\s_-]+", name.strip().casefold()))
        return str(int(name)) if name.isdecimal() else name

    numbered = bool(names) and all(map(str.isdecimal, names))
    numbers = {plain(name): number for number, name in reversed(list(enumerate(names)))}
    found = []
    for label in labels:
        if not isinstance(label, str):
            found.append(label)
        elif plain(label) in numbers:
            found.append(numbers[plain(label)])
        elif plain(label).isdecimal() and int(label) < num_classes and not numbered:
            found.append(int(label))
        else:
            named = list(names) != [str(number) for number in range(len(names))]
            require(named and bool(names), "labels", label, f"a class, 0 to {num_classes - 1}, by number alone")
            close = difflib.get_close_matches(plain(label), numbers, n=3, cutoff=0.5)
            near = f"did you mean {', '.join(repr(names[numbers[name]]) for name in close)}? " if close else ""
            known = f"{', '.join(names[:20])}{', …' * (len(names) > 20)}"
            raise ValueError(f"labels must be classes of this model, got {label!r}; {near}classes: {known}")
    return found


class TextConditioning(nn.Module):
    """t (B,) and a text -> conditioning (B, d), text tokens (B, M, d) and their mask (B, M)."""

    def __init__(self, width: int, encoder: str, features: int, length: int, pooled_features: int):
        super().__init__()
        self.encoder, self.features, self.length, self.pooled_features = encoder, features, length, pooled_features
        self.time = TimeEmbedding(width)
        self.characters = CharacterEncoder(features) if encoder == CHARACTERS else None
        self.norm = nn.RMSNorm(features, eps=1e-6)
        self.project = nn.Linear(features, width)
        self.pooled = nn.Linear(pooled_features, width) if pooled_features else None
        self.null = nn.Parameter(0.5 * torch.randn(width))  # stands in for a prompt that is not there

    def forward(self, t: Tensor, y: Condition, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """y: a `Text`, embeddings, or the characters (B, M) of `encode_characters`. dtype: as in `TimeEmbedding`."""
        y = as_text(y)
        text: Text = y if isinstance(y, Text) else self.characters(y)  # pyrefly: ignore[not-callable]
        tokens = self.project(self.norm(text.embeddings.to(dtype or self.project.weight.dtype)))
        absent = ~text.mask.any(1, keepdim=True)  # (B, 1)
        first = torch.arange(text.mask.shape[1], device=text.mask.device) == 0
        tokens = torch.where((absent & first)[..., None], self.null.to(tokens.dtype), tokens)
        c = self.time(t, dtype)
        if self.pooled is not None:
            pooled = text.pooled
            if pooled is None:  # the mean of the tokens, zero where there are none
                weights = text.mask[..., None].to(text.embeddings.dtype)
                pooled = (text.embeddings * weights).sum(1) / weights.sum(1).clamp(min=1)
            c = c + torch.where(absent, self.null.to(c.dtype), self.pooled(pooled.to(c.dtype)))
        return c, tokens, text.mask | absent & first

    def prepare(self, y: Condition | Sequence[str] | str) -> Condition:
        """Prompts (one or several, for characters), or a forward's y, as a batch on the CPU. Raises ValueError."""
        if not isinstance(y, Tensor | Text):
            valid = f"embeddings of {self.encoder!r}, as elit.TextEncoder makes them"
            require(self.characters is not None, "y", y, valid)
            y = encode_characters([y] if isinstance(y, str) else y, self.length)
        require(len(y) > 0, "y", len(y), "at least one prompt or its embeddings")
        y = y.to("cpu")  # where its values can be checked
        self.check(y, len(y))
        return y

    def check(self, y: Condition, batch: int) -> None:
        """Raises ValueError where y does not fit a batch; looks at values only on the CPU."""
        text = as_text(y)
        if isinstance(text, Tensor):
            if self.characters is None or text.ndim != 2 or text.shape[0] != batch:
                valid = "embeddings" if self.characters is None else "characters"
                raise ValueError(f"y must be {valid} ({batch}, M, …), got {text.dtype} {tuple(text.shape)}")
            if on_cpu(text) and not ((text >= 0) & (text <= 256)).all():
                raise ValueError("y must be characters, bytes plus 1, or 0 for padding")
            return
        shape, width = text.embeddings.shape, self.pooled_features
        if len(shape) != 3 or shape[0] != batch or shape[2] != self.features:
            raise ValueError(f"y must be embeddings ({batch}, M, {self.features}), got {tuple(shape)}")
        if width and text.pooled is None and width != self.features:
            raise ValueError(f"y.pooled must be ({batch}, {width}), got None")

    def without(self, y: Condition, dropped: Tensor | None = None) -> Condition:
        """The same prompts, those of `dropped` (B,) bool, by default all, not there."""
        y = as_text(y)
        if isinstance(y, Tensor):
            return torch.zeros_like(y) if dropped is None else torch.where(dropped[:, None], 0, y)
        return replace(y, mask=torch.zeros_like(y.mask) if dropped is None else y.mask & ~dropped[:, None])

    def example(self, batch: int) -> Condition:
        """Some y as long as this network takes, on the CPU."""
        if self.characters is not None:
            return torch.randint(1, 257, (batch, self.length))
        mask = torch.ones(batch, self.length, dtype=torch.bool)
        return Text(torch.randn(batch, self.length, self.features), mask, torch.randn(batch, self.pooled_features))


class CharacterEncoder(nn.Module):
    """A small encoder trained along, so that text-to-image needs no download: UTF-8 bytes, two blocks."""

    def __init__(self, features: int, depth: int = 2):
        super().__init__()
        require(features % 2 == 0, "text_features", features, "even for characters")
        heads = 4 if features % 8 == 0 else 1
        self.head_width = features // heads
        self.embedding = nn.Embedding(1 + 256, features)  # 0 is padding
        self.norms = nn.ModuleList(layer_norm(features, affine=True) for _ in range(2 * depth))
        self.attentions = nn.ModuleList(SelfAttention(features, heads) for _ in range(depth))
        self.mlps = nn.ModuleList(Mlp(features, 4 * features) for _ in range(depth))

    def forward(self, characters: Tensor) -> Text:
        """characters (B, M) int64, 0 = padding -> `Text`."""
        mask = characters > 0
        place = torch.arange(characters.shape[1], device=characters.device)
        rope = rope_tables(place[:, None].float(), self.head_width)
        seen = (mask | (place == 0))[:, None, None]  # a prompt that is not there must not divide by zero
        x = self.embedding(characters)
        for i, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            x = x + attention(self.norms[2 * i](x), rope, seen)
            x = x + mlp(self.norms[2 * i + 1](x))
        return Text(x, mask)


def encode_characters(prompts: Sequence[str], length: int) -> Tensor:
    """Prompts as UTF-8 bytes plus 1, padded with 0: (B, longest) int64. Raises ValueError past `length` bytes."""
    rows = [prompt.encode() for prompt in prompts]
    if long := [row[: length + 40].decode(errors="ignore") for row in rows if len(row) > length]:
        raise ValueError(f"prompt must be at most text_length={length} bytes, got {long[0]!r}")
    width = max(1, *map(len, rows), 1)
    return torch.tensor([[byte + 1 for byte in row] + [0] * (width - len(row)) for row in rows]).view(-1, width)


def as_text(y: Condition) -> Condition:
    """Bare embeddings (B, M, F) as a `Text` without padding; characters stay as they are."""
    if isinstance(y, Tensor) and y.is_floating_point():
        return Text(y, torch.ones(y.shape[:2], dtype=torch.bool, device=y.device))
    return y
