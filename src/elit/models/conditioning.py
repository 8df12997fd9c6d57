"""Conditions of a network beside the noisy sample: the time, and a class or a text.

B batch, d width, M tokens of a text, F their features, P pooled features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor, nn

from elit.models.layers import Mlp, SelfAttention, layer_norm, rope_tables, weights_of

CHARACTERS = "characters"
"""Name of the built-in text encoder in configs, beside those of the Hugging Face hub."""


class TimeEmbedding(TimestepEmbedding):
    """t (B,) in [0, 1] -> (B, d): sinusoid of `scale`·t, linear, SiLU, linear."""

    frequencies = 256

    def __init__(self, width: int, scale: float = 1000.0):
        super().__init__(self.frequencies, width)
        self.scale = scale

    def forward(self, t: Tensor) -> Tensor:
        sinusoid = get_timestep_embedding(
            self.scale * t.float(), self.frequencies, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        return super().forward(sinusoid.to(self.linear_1.weight.dtype))

    def flops(self) -> int:
        return 2 * weights_of(self.linear_1, self.linear_2)


class ClassConditioning(nn.Module):
    """t (B,) in [0, 1] and class y (B,) -> conditioning (B, d); y = num_classes is the null class."""

    def __init__(self, width: int, num_classes: int, time_scale: float = 1000.0):
        super().__init__()
        self.time = TimeEmbedding(width, time_scale)
        self.label = nn.Embedding(num_classes + 1, width)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.time(t) + self.label(y.long())

    def flops(self) -> int:
        return self.time.flops()


@dataclass(frozen=True)
class Text:
    """Encoded prompts, the `y` of a text-conditional network."""

    embeddings: Tensor
    """(B, M, F) floating point, one vector a token."""
    mask: Tensor
    """(B, M) bool, False where a prompt is padded. A row of False is "no text", as in the unconditional branch."""
    pooled: Tensor | None = None
    """(B, P), one vector a prompt; None = the mean of its tokens, where the network wants one."""

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, rows: slice | Tensor) -> "Text":
        return Text(self.embeddings[rows], self.mask[rows], None if self.pooled is None else self.pooled[rows])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Text":
        moved = {
            name: part.to(device, non_blocking=non_blocking) for name, part in vars(self).items() if part is not None
        }
        return Text(**moved)


Condition = Tensor | Text  # y of a forward: labels, characters or embeddings


def concatenate(parts: Sequence[Condition]) -> Condition:
    """Conditions of several batches, all of one kind, as those of one."""
    texts = [part for part in parts if isinstance(part, Text)]
    if not texts:
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    pooled = [part.pooled for part in texts if part.pooled is not None]
    embeddings, mask = torch.cat([part.embeddings for part in texts]), torch.cat([part.mask for part in texts])
    return Text(embeddings, mask, torch.cat(pooled) if pooled else None)


class TextConditioning(nn.Module):
    """t (B,) and a text -> conditioning (B, d), text tokens (B, M, d) and their mask (B, M).

    The conditioning is the time alone, or with `pooled_features` the time and the text's pooled vector.
    """

    def __init__(self, width: int, text_features: int, pooled_features: int, characters: bool):
        super().__init__()
        self.time = TimeEmbedding(width)
        self.characters = CharacterEncoder(text_features) if characters else None
        self.norm = nn.RMSNorm(text_features, eps=1e-6)
        self.project = nn.Linear(text_features, width)
        self.pooled = nn.Linear(pooled_features, width) if pooled_features else None
        self.null = nn.Parameter(0.5 * torch.randn(width))  # stands in for a prompt that is not there

    def forward(self, t: Tensor, y: Condition) -> tuple[Tensor, Tensor, Tensor]:
        """y: a `Text`, or the characters (B, M) of `encode_characters`."""
        text: Text = y if isinstance(y, Text) else self.characters(y)  # pyrefly: ignore[not-callable]
        tokens = self.project(self.norm(text.embeddings.to(self.project.weight.dtype)))
        absent = ~text.mask.any(1, keepdim=True)  # (B, 1)
        first = torch.arange(text.mask.shape[1], device=text.mask.device) == 0
        tokens = torch.where((absent & first)[..., None], self.null.to(tokens.dtype), tokens)
        c = self.time(t)
        if self.pooled is not None:
            pooled = masked_mean(text.embeddings, text.mask) if text.pooled is None else text.pooled
            c = c + torch.where(absent, self.null.to(c.dtype), self.pooled(pooled.to(c.dtype)))
        return c, tokens, text.mask | absent & first

    def flops(self, text_length: int) -> int:
        total = self.time.flops() + 2 * text_length * weights_of(self.project)
        total += 2 * weights_of(self.pooled) if self.pooled else 0
        return total + (self.characters.flops(text_length) if self.characters else 0)


class CharacterEncoder(nn.Module):
    """A small encoder trained along, so that text-to-image needs no download: UTF-8 bytes, two blocks."""

    depth = 2

    def __init__(self, features: int):
        super().__init__()
        if features % 2:
            raise ValueError(f"text_features={features}: give an even number for characters")
        depth, heads = self.depth, 4 if features % 8 == 0 else 1
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

    def flops(self, length: int) -> int:
        features = self.embedding.embedding_dim
        return self.depth * (24 * length * features**2 + 4 * length**2 * features)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of a text: (B, M, F), (B, M) -> (B, F); zero where there are none."""
    weights = mask[..., None].to(x.dtype)
    return (x * weights).sum(1) / weights.sum(1).clamp(min=1)


def encode_characters(prompts: Sequence[str], length: int) -> Tensor:
    """Prompts as UTF-8 bytes plus 1, padded with 0: (B, longest) int64. Raises ValueError past `length` bytes."""
    rows = [prompt.encode() for prompt in prompts]
    if too_long := [prompt for prompt, row in zip(prompts, rows, strict=True) if len(row) > length]:
        raise ValueError(f"prompt must be at most text_length={length} bytes, got {too_long[0]!r}")
    width = max(1, *map(len, rows), 1)
    return torch.tensor([[byte + 1 for byte in row] + [0] * (width - len(row)) for row in rows]).view(-1, width)


def as_text(y: Condition) -> Condition:
    """Bare embeddings (B, M, F) as a `Text` without padding; characters stay as they are."""
    if isinstance(y, Tensor) and y.is_floating_point():
        return Text(y, torch.ones(y.shape[:2], dtype=torch.bool, device=y.device))
    return y


def without_text(y: Condition, dropped: Tensor | None = None) -> Condition:
    """The same prompts, those of `dropped` (B,) bool, or all, not there."""
    if isinstance(y, Tensor):
        return torch.zeros_like(y) if dropped is None else torch.where(dropped[:, None], 0, y)
    return replace(y, mask=torch.zeros_like(y.mask) if dropped is None else y.mask & ~dropped[:, None])
