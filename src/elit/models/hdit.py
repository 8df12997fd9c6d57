"""HDiT and ELIT-HDiT: the middle blocks work on merged tokens, four in one (paper section 4, Table 1)."""

from typing import ClassVar

import torch
from diffusers import ModelMixin as ModelMixin  # diffusers looks for it beside the class when it loads a pipeline
from torch import Tensor, nn

from elit.models.dit import DiT
from elit.models.layers import Block, Rope
from elit.models.layout import KINDS, MERGED, Kind, merged_blocks
from elit.models.transformer import AuxStreams


class WideBlock(Block):
    """A block for merged tokens, 2d wide; the conditioning stays d wide."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float):
        super().__init__(2 * width, 2 * num_heads, mlp_ratio, condition_width=width)


class HDiT(DiT):
    """DiT whose middle blocks (8 to 19 of 28) run on N/4 tokens of width 2d; arguments as there, attention is full.

    Four tokens that lie side by side in the sequence become one: the baseline's windows are 2×2, so these are 2×2
    neighbours; in ELIT-HDiT they are 4 latents of one group, so budgets are multiples of 4, and the wide blocks must
    lie in the core.
    """

    _no_split_modules: ClassVar = ["Block", "WideBlock", "Read", "Write"]
    _repeated_blocks: ClassVar = ["Block", "WideBlock"]
    kind: ClassVar[Kind] = KINDS["HDiT"]

    def make_blocks(self) -> list[nn.Module]:
        width, num_heads, mlp_ratio = self.config.hidden_size, self.config.num_heads, self.config.mlp_ratio
        self.merge = nn.Linear(MERGED * width, 2 * width)
        self.split = nn.Linear(2 * width, MERGED * width)
        self.keep = nn.Parameter(torch.full((1,), 0.5))  # share of the tokens before the merge in those after the split
        wide = merged_blocks(self.config.depth)
        kinds = [WideBlock if i in wide else Block for i in range(self.config.depth)]
        return [kind(width, num_heads, mlp_ratio) for kind in kinds]

    def run_blocks(
        self, blocks: nn.ModuleList, x: Tensor, c: Tensor, rope: Rope, aux: AuxStreams
    ) -> tuple[Tensor, AuxStreams]:
        wide = [i for i, block in enumerate(blocks) if isinstance(block, WideBlock)]
        if not wide:
            return super().run_blocks(blocks, x, c, rope, aux)
        first, end = wide[0], wide[-1] + 1
        x, _ = super().run_blocks(blocks[:first], x, c, rope, ())  # (B, L, d)
        merged = self.merge(x.unflatten(1, (-1, MERGED)).flatten(2))  # (B, L/4, 2d)
        merged, _ = super().run_blocks(blocks[first:end], merged, c, rope.every(MERGED), ())
        fine = self.split(merged).unflatten(2, (MERGED, -1)).flatten(1, 2)  # (B, L, d)
        return super().run_blocks(blocks[end:], fine + self.keep * (x - fine), c, rope, aux)
