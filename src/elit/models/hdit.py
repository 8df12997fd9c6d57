"""HDiT and ELIT-HDiT: the middle blocks work on merged tokens, four in one (paper section 4, Table 1)."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from diffusers import ModelMixin as ModelMixin  # diffusers looks for it beside the class when it loads a pipeline
from torch import Tensor, nn

from elit.config import require
from elit.models.dit import DiT
from elit.models.layers import Block, Rope
from elit.models.transformer import Streams
from elit.models.windows import Shape

MERGED = 4  # tokens in one, 2×2 neighbours or 4 latents of one window


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

    _no_split_modules: ClassVar = ["Block", "WideBlock", "LatentInterface"]
    _repeated_blocks: ClassVar = ["Block", "WideBlock"]
    budget_step: ClassVar[int] = MERGED

    def window(self, size: Sequence[int]) -> Shape:
        return self.spec.window if self.spec else (1,) * (len(size) - 2) + (2, 2)

    @property
    def cell(self) -> Shape:
        *frames, rows, columns = self.patch_size
        return self.patch_size if self.spec else (*frames, 2 * rows, 2 * columns)

    def check_sizes(self) -> None:
        super().check_sizes()
        depth, (head, core, _) = self.config.depth, self.spec.split if self.spec else (0, self.config.depth, 0)
        wide = merged_blocks(depth)
        inside = head <= wide.start < wide.stop <= head + core
        require(inside, "split", self.spec and self.spec.split, f"a core with blocks {wide.start} to {wide.stop} in it")

    @staticmethod
    def default_split(depth: int) -> tuple[int, int, int]:
        outer = min(DiT.default_split(depth)[0], merged_blocks(depth).start)  # the wide blocks lie in the core
        return outer, depth - 2 * outer, outer

    def make_blocks(self) -> list[nn.Module]:
        width, num_heads, mlp_ratio = self.config.hidden_size, self.config.num_heads, self.config.mlp_ratio
        self.merge = nn.Linear(MERGED * width, 2 * width)
        self.split = nn.Linear(2 * width, MERGED * width)
        self.keep = nn.Parameter(torch.full((1,), 0.5))  # share of the tokens before the merge in those after the split
        wide = merged_blocks(self.config.depth)
        kinds = [WideBlock if i in wide else Block for i in range(self.config.depth)]
        return [kind(width, num_heads, mlp_ratio) for kind in kinds]

    def run_blocks(
        self, blocks: nn.ModuleList, x: Tensor, c: Tensor, rope: Rope, aux: Streams
    ) -> tuple[Tensor, Streams]:
        wide = [i for i, block in enumerate(blocks) if isinstance(block, WideBlock)]
        if not wide:
            return super().run_blocks(blocks, x, c, rope, aux)
        first, end = wide[0], wide[-1] + 1
        x, _ = super().run_blocks(blocks[:first], x, c, rope, ())  # (B, L, d)
        merged = self.merge(x.unflatten(1, (-1, MERGED)).flatten(2))  # (B, L/4, 2d)
        rope_of_first = Rope(rope.cos[::MERGED], rope.sin[::MERGED])  # of four merged ones
        merged, _ = super().run_blocks(blocks[first:end], merged, c, rope_of_first, ())
        fine = self.split(merged).unflatten(2, (MERGED, -1)).flatten(1, 2)  # (B, L, d)
        return super().run_blocks(blocks[end:], fine + self.keep * (x - fine), c, rope, aux)


def merged_blocks(depth: int) -> range:
    """The blocks that work on merged tokens: 8 to 19 of 28, and in proportion."""
    outer = min(round(depth * 8 / 28), (depth - 1) // 2)
    return range(outer, depth - outer)
