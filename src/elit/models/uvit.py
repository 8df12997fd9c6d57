"""U-ViT and ELIT-U-ViT: DiT with long skips between a block and its mirror (paper section 4, Table 1)."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from diffusers import ModelMixin as ModelMixin  # diffusers looks for it beside the class when it loads a pipeline
from torch import Tensor, nn

from elit.models.dit import DiT
from elit.models.layers import Block, Rope
from elit.models.transformer import Streams


class SkipBlock(Block):
    """A block whose output skips to its mirror, or that takes its mirror's: concatenated, and back to width d."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, *, gives: bool, takes: bool):
        super().__init__(width, num_heads, mlp_ratio)
        self.gives = gives
        self.skip = nn.Linear(2 * width, width) if takes else None

    def forward(self, x: Tensor, c: Tensor, rope: Rope, skipped: Tensor | None = None) -> Tensor:
        """x and skipped (B, L, d), c (B, d) -> (B, L, d)."""
        if self.skip is not None:
            x = self.skip(torch.cat((x, skipped), -1))  # pyrefly: ignore[bad-argument-type]
        return super().forward(x, c, rope)


class UViT(DiT):
    """DiT with long skips; arguments as there.

    Block i is paired with block depth − 1 − i; the middle block or two have none. In ELIT-U-ViT the head's blocks are
    paired with the tail's and the core's first half with its second: all of one kind of token.
    """

    _no_split_modules: ClassVar = ["SkipBlock", "LatentInterface"]
    _repeated_blocks: ClassVar = ["SkipBlock"]

    def make_blocks(self) -> list[nn.Module]:
        depth, sizes = self.config.depth, (self.config.hidden_size, self.config.num_heads, self.config.mlp_ratio)
        pairs = skip_pairs(depth, self.spec.split if self.spec else None)
        return [SkipBlock(*sizes, gives=i in pairs, takes=i in pairs.values()) for i in range(depth)]

    def run_blocks(
        self, blocks: nn.ModuleList, x: Tensor, c: Tensor, rope: Rope, aux: Streams
    ) -> tuple[Tensor, Streams]:
        """The auxiliary stream is a stack of outputs: a block pushes its own, and its mirror pops it."""
        for block in blocks:
            if block.skip is None:
                x = self.checkpointed_call(block, x, c, rope)
            else:
                x, aux = self.checkpointed_call(block, x, c, rope, aux[-1]), aux[:-1]
            if block.gives:
                aux = (*aux, x)
        return x, aux


def skip_pairs(depth: int, split: Sequence[int] | None) -> dict[int, int]:
    """{block: the later block that its output skips to}, for a baseline or the split of an ELIT network."""
    head, core, tail = split or (0, depth, 0)
    outer = {head - 1 - i: head + core + i for i in range(min(head, tail))}
    return outer | {head + i: head + core - 1 - i for i in range((core - 1) // 2)}
