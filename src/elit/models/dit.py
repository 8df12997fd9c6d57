"""DiT and ELIT-DiT, class-conditional, for images (B, C, H, W) and video (B, C, T, H, W)."""

from collections.abc import Sequence
from typing import Any, ClassVar

from diffusers import ModelMixin as ModelMixin  # diffusers looks for it beside the class when it loads a pipeline
from diffusers.configuration_utils import register_to_config
from torch import nn

from elit.models.conditioning import ClassConditioning
from elit.models.layers import Block
from elit.models.transformer import Transformer
from elit.models.windows import InterfaceSpec


class DiT(Transformer):
    """Diffusion transformer with RoPE, QK-norm and adaLN-Zero; with `interface`, ELIT-DiT (paper sections 2 and 3).

    Its output is the velocity of rectified flow, v = X1 − X0 at X_t = (1 − t)·X0 + t·X1: X0 is noise, X1 data.
    With an interface: head blocks on N tokens, Read, core blocks on K = G·J̃ latents, Write, tail blocks on N tokens.

    sample_size: pixels or autoencoder cells along each axis, an int for square images, (T, H, W) for video.
    in_channels: C, channels of a sample. patch_size: pixels or cells of a token, an int or one entry an axis.
    hidden_size: width d. depth: blocks in all. num_heads: attention heads, each even and at least 2 · (axes + 1) wide.
    mlp_ratio: width of the MLPs' hidden layer over d. num_classes: the label num_classes is the null class.
    interface: an `InterfaceSpec` (or its dict form); None is the plain baseline. Nothing else differs.
    class_names: what the labels 0, 1, … stand for, so that `elit.sample` and the commands take names too.

    Raises ValueError, naming argument and value, where the sizes do not fit each other.
    """

    block: ClassVar[type[Block]] = Block

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
        class_names: Sequence[str] | None = None,
    ):
        super().__init__()
        self.build()

    def make_conditioning(self) -> ClassConditioning:
        names = self.config.get("class_names") or ()
        return ClassConditioning(self.config.hidden_size, self.config.num_classes, names)

    def make_blocks(self) -> list[nn.Module]:
        sizes = self.config.hidden_size, self.config.num_heads, self.config.mlp_ratio
        return [self.block(*sizes) for _ in range(self.config.depth)]
