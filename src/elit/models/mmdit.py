"""MM-DiT and ELIT-MM-DiT, text-conditional: a stream of image tokens and one of text, joined in attention.

B batch, L image tokens or latents, M text tokens, d width, H heads, h head width.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import ModelMixin as ModelMixin  # diffusers looks for it beside the class when it loads a pipeline
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from elit.config import require
from elit.models.conditioning import CHARACTERS, TextConditioning
from elit.models.layers import Block, Modulation, QKNorm, Rope, attend, layer_norm, modulate
from elit.models.transformer import Streams, Transformer
from elit.models.windows import InterfaceSpec


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


class MMDiT(Transformer):
    """Text-conditional diffusion transformer of double-stream blocks; with `interface`, ELIT-MM-DiT.

    Latents take the place of the image stream alone; the text stream runs through head, core and tail as it is.

    text_encoder: "characters", built in and trained along, or the Hugging Face name or folder of the encoder whose
    embeddings the network is trained on (it is not part of the network). text_features: F of its embeddings.
    text_length: M, tokens of a prompt at most (bytes, for characters). pooled_features: P, width of the pooled text
    that joins the time in the conditioning; 0 = the time alone. Others as in `DiT`.

    y of a forward is a `Text` (embeddings, mask, pooled), embeddings (B, M, F) without padding, or for characters the
    (B, M) integers of `encode_characters`; `model.conditioning.prepare` makes them of prompts.
    """

    _no_split_modules: ClassVar = ["JointBlock", "LastJointBlock", "LatentInterface", "TextConditioning"]
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
        own = text_encoder != CHARACTERS or pooled_features in (0, text_features)
        require(own, "pooled_features", pooled_features, f"0 or text_features = {text_features} with characters")
        self.build()

    def make_conditioning(self) -> TextConditioning:
        names = "hidden_size", "text_encoder", "text_features", "text_length", "pooled_features"
        return TextConditioning(*(self.config[name] for name in names))

    def make_blocks(self) -> list[nn.Module]:
        sizes = self.config.hidden_size, self.config.num_heads, self.config.mlp_ratio
        return [*(JointBlock(*sizes) for _ in range(self.config.depth - 1)), LastJointBlock(*sizes)]

    def run_blocks(
        self, blocks: nn.ModuleList, x: Tensor, c: Tensor, rope: Rope, aux: Streams
    ) -> tuple[Tensor, Streams]:
        """The auxiliary streams are the text tokens (B, M, d) and their mask (B, M)."""
        text, text_mask = aux
        mask = F.pad(text_mask, (0, x.shape[1]), value=True)[:, None, None]  # (B, 1, 1, M + L)
        for block in blocks:
            x, text = self.checkpointed_call(block, x, text, c, rope, mask)
        return x, (text, text_mask)
