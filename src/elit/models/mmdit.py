"""MM-DiT and ELIT-MM-DiT, text-conditional: a stream of image tokens and one of text, joined in attention.

B batch, L image tokens or latents, M text tokens, d width, H heads, h head width.
"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import ModelMixin as ModelMixin  # diffusers looks for it beside the class when it loads a pipeline
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from elit.config import require
from elit.models.conditioning import (
    CHARACTERS,
    Condition,
    Text,
    TextConditioning,
    as_text,
    encode_characters,
    without_text,
)
from elit.models.interface import InterfaceSpec
from elit.models.layers import Block, Modulation, QKNorm, Rope, attend, layer_norm, modulate, weights_of
from elit.models.transformer import AuxStreams, Transformer, on_cpu


class JointBlock(nn.Module):
    """A double-stream block: image and text have weights of their own and attend to each other (SD3, Qwen-Image)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.image = Block(width, num_heads, mlp_ratio)
        self.text = Block(width, num_heads, mlp_ratio)

    def forward(self, x: Tensor, text: Tensor, c: Tensor, rope: Rope, mask: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, L, d), text (B, M, d), c (B, d), mask (B, 1, 1, M + L) bool -> x and text. The text is not rotated."""
        shift_x, scale_x, *rest_x = self.image.modulation(c)
        shift_t, scale_t, *rest_t = self.text.modulation(c)
        of_image = self.image.attention.project(modulate(self.image.norm1(x), shift_x, scale_x), rope)
        of_text = self.text.attention.project(modulate(self.text.norm1(text), shift_t, scale_t), None)
        q, k, v = (torch.cat(pair, 1) for pair in zip(of_text, of_image, strict=True))  # (B, M + L, H, h)
        mixed_text, mixed = attend(q, k, v, mask).split((text.shape[1], x.shape[1]), 1)
        return self.image.finish(x, mixed, *rest_x), self.text.finish(text, mixed_text, *rest_t)

    def flops(self, length: int, text: int) -> int:
        """As of `Block`, for `length` image tokens and `text` ones."""
        pairs = 2 * 4 * length * text * self.image.attention.proj.in_features  # each attends to the other's
        return self.image.flops(length) + self.text.flops(text) + pairs


class LastJointBlock(nn.Module):
    """The last block: attends to the text without updating it."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.image = Block(width, num_heads, mlp_ratio)
        self.text_modulation = Modulation(width, 2)
        self.text_norm = layer_norm(width)
        self.text_kv = nn.Linear(width, 2 * width)
        self.text_k_norm = QKNorm(width // num_heads)

    def forward(self, x: Tensor, text: Tensor, c: Tensor, rope: Rope, mask: Tensor) -> tuple[Tensor, Tensor]:
        shift_x, scale_x, *rest_x = self.image.modulation(c)
        q, k, v = self.image.attention.project(modulate(self.image.norm1(x), shift_x, scale_x), rope)
        kv = self.text_kv(modulate(self.text_norm(text), *self.text_modulation(c)))
        text_k, text_v = kv.unflatten(-1, (2, q.shape[2], -1)).unbind(2)
        k = torch.cat((self.text_k_norm(text_k).to(k.dtype), k), 1)
        mixed = attend(q, k, torch.cat((text_v, v), 1), mask)
        return self.image.finish(x, mixed, *rest_x), text

    def flops(self, length: int, text: int) -> int:
        linear = weights_of(self.text_modulation.linear) + text * weights_of(self.text_kv)
        return self.image.flops(length) + 2 * linear + 4 * length * text * self.text_kv.in_features


class MMDiT(Transformer):
    """Text-conditional diffusion transformer of double-stream blocks; with `interface`, ELIT-MM-DiT.

    Latents take the place of the image stream alone; the text stream runs through head, core and tail as it is.

    sample_size, in_channels, patch_size, interface: as in `DiT`.
    text_encoder: "characters", built in and trained along, or the Hugging Face name or folder of the encoder whose
    embeddings the network is trained on (it is not part of the network). text_features: F of its embeddings.
    text_length: M, tokens of a prompt at most (bytes, for characters). pooled_features: P, width of the pooled text
    that joins the time in the conditioning; 0 = the time alone.

    y of a forward is a `Text` (embeddings, mask, pooled), embeddings (B, M, F) without padding, or for characters the
    (B, M) integers of `encode_characters`. `conditions` turns prompts into y.

    Raises ValueError where the sizes do not fit each other.
    """

    _no_split_modules: ClassVar = ["JointBlock", "LastJointBlock", "Read", "Write"]
    _repeated_blocks: ClassVar = ["JointBlock"]

    takes_text: ClassVar[bool] = True

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
        text_encoder: str = CHARACTERS,
        text_features: int = 256,
        text_length: int = 64,
        pooled_features: int = 256,
        interface: InterfaceSpec | dict[str, Any] | None = None,
    ):
        super().__init__()
        if text_encoder == CHARACTERS:
            own = pooled_features in (0, text_features)
            require(own, "pooled_features", pooled_features, f"0 or text_features = {text_features} with characters")
        self.build()

    def make_conditioning(self) -> nn.Module:
        config, characters = self.config, self.config.text_encoder == CHARACTERS
        return TextConditioning(config.hidden_size, config.text_features, config.pooled_features, characters)

    def conditioning_flops(self) -> int:
        return self.conditioning.flops(self.config.text_length)  # pyrefly: ignore[not-callable]

    def stage_flops(self, blocks: Iterable[nn.Module], length: int) -> int:
        """With a text of text_length tokens."""
        return sum(block.flops(length, self.config.text_length) for block in blocks)  # pyrefly: ignore[not-callable]

    def make_blocks(self) -> list[nn.Module]:
        sizes = self.config.hidden_size, self.config.num_heads, self.config.mlp_ratio
        return [*(JointBlock(*sizes) for _ in range(self.config.depth - 1)), LastJointBlock(*sizes)]

    def condition(self, t: Tensor, y: Condition) -> tuple[Tensor, AuxStreams]:
        """The auxiliary streams are the text tokens (B, M, d) and their mask (B, M)."""
        c, *aux = self.conditioning(t, as_text(y))
        return c, tuple(aux)

    def run_blocks(
        self, blocks: nn.ModuleList, x: Tensor, c: Tensor, rope: Rope, aux: AuxStreams
    ) -> tuple[Tensor, AuxStreams]:
        text, text_mask = aux
        mask = F.pad(text_mask, (0, x.shape[1]), value=True)[:, None, None]  # (B, 1, 1, M + L)
        for block in blocks:
            x, text = self.checkpointed_call(block, x, text, c, rope, mask)
        return x, (text, text_mask)

    def prepare_condition(self, y: Any) -> Condition:
        """Prompts (one or several, for characters), or what a forward takes as y, as a batch."""
        y = [y] if isinstance(y, str) else y
        if not isinstance(y, Tensor | Text):
            if (name := self.config.text_encoder) != CHARACTERS:
                raise ValueError(f"y must be embeddings of {name!r}, as elit.TextEncoder makes them, got prompts")
            y = encode_characters(y, self.config.text_length)
        require(len(y) > 0, "y", len(y), "at least one prompt or its embeddings")
        y = y.to("cpu")  # where its values can be checked
        self.check_condition(y, len(y))
        return y

    def without_condition(self, y: Condition, dropped: Tensor | None = None) -> Condition:
        return without_text(as_text(y), dropped)

    def example_condition(self, batch: int) -> Condition:
        length, features = self.config.text_length, self.config.text_features
        if self.config.text_encoder == CHARACTERS:
            return torch.randint(1, 257, (batch, length))
        mask = torch.ones(batch, length, dtype=torch.bool)
        return Text(torch.randn(batch, length, features), mask, torch.randn(batch, self.config.pooled_features))

    def check_condition(self, y: Condition, batch: int) -> None:
        features, width = self.config.text_features, self.config.pooled_features
        if isinstance(y, Tensor) and not y.is_floating_point():
            if self.config.text_encoder != CHARACTERS or y.ndim != 2 or len(y) != batch:
                valid = "characters" if self.config.text_encoder == CHARACTERS else "embeddings"
                raise ValueError(f"y must be {valid} ({batch}, M, …), got {y.dtype} {tuple(y.shape)}")
            if on_cpu(y) and not ((y >= 0) & (y <= 256)).all():
                raise ValueError("y must be characters, bytes plus 1, or 0 for padding")
            return
        text = y if isinstance(y, Text) else None
        embeddings = y.embeddings if isinstance(y, Text) else y
        if embeddings.ndim != 3 or len(embeddings) != batch or embeddings.shape[2] != features:
            raise ValueError(f"y must be embeddings ({batch}, M, {features}), got {tuple(embeddings.shape)}")
        if text and (text.mask.shape != embeddings.shape[:2] or text.mask.dtype != torch.bool):
            given = f"{text.mask.dtype} {tuple(text.mask.shape)}"
            raise ValueError(f"y.mask must be torch.bool {tuple(embeddings.shape[:2])}, got {given}")
        pooled = text.pooled if text else None
        if width and (width != features if pooled is None else pooled.shape != (batch, width)):
            raise ValueError(
                f"y.pooled must be ({batch}, {width}), got {None if pooled is None else tuple(pooled.shape)}"
            )
