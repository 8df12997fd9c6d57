"""The interface of an elastified transformer: Read into latents that carry the group's own tokens, Write their change.

B batch, G windows, n tokens of a window, J̃ of them kept, d width; N tokens and K latents in all. Sequences (B, N, d)
and (B, K, d) are in the model's own raster order; `KeptTokens` has their grouping.

Two modes. *learned* is the paper's (section 3): latents are learned vectors, Write adds what cross-attention finds.
*carry* keeps a pretrained core alive: latent j of a window starts as the token at its j-th place, coarse to
fine, plus the learned vector, which starts at zero; Write gives each token the change of its latent.
"""

import math
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from elit.compat import LORA_WEIGHT
from elit.elastic.context import bypassed
from elit.elastic.cost import linear_layers
from elit.elastic.families.family import Model
from elit.models.interface import LatentInterface
from elit.models.layers import sliceable
from elit.models.windows import Shape, Windows, joined, remembered


@cache
def coarse_to_fine(window: Shape) -> tuple[int, ...]:
    """The n places of a window (raster indices), ordered so that any prefix covers the window evenly."""
    places = Windows(window, window).raster.double()  # (n, axes)
    sides = torch.tensor(window, dtype=torch.float64)
    apart = (places[:, None] - places).abs()
    squared = torch.minimum(apart, sides - apart).square().sum(-1)  # (n, n)
    crowding = 1 / squared.clamp(min=1e-9)

    order = [int((places - (sides / 2).floor()).square().sum(-1).argmin())]  # the middle serves a lone token best
    nearest, crowd = squared[order[0]], crowding[order[0]]
    while len(order) < len(places):
        far = nearest > nearest.max() - 1e-6
        order.append(int(torch.where(far, (crowd * 1e6).round(), torch.inf).argmin()))
        nearest, crowd = torch.minimum(nearest, squared[order[-1]]), crowd + crowding[order[-1]]
    return tuple(order)


def spread_to_window(window: Shape, num_latents: int) -> Tensor:
    """(n, J̃): the mean that each place of a window takes of the kept tokens nearest to it; rows sum to 1."""
    places = Windows(window, window).raster.float()
    distance = torch.cdist(places, places[list(coarse_to_fine(window)[:num_latents])])  # (n, J̃)
    nearest = (distance < distance.amin(1, keepdim=True) + 1e-4).float()
    return nearest / nearest.sum(1, keepdim=True)


class KeptGrid:
    """One token grid at its budget; entry i of a table is for windows of shape i."""

    def __init__(self, grid: Shape, window: Shape, budget: int, device: torch.device):
        self.windows = windows = Windows(grid, window)
        self.budget = budget
        counts = [(shape, j) for (shape, _), j in zip(windows.shapes, windows.latents(budget), strict=True)]
        slots = [torch.tensor(coarse_to_fine(shape)[:j]) for shape, j in counts]
        groups = zip(windows.groups(windows.order[None, :, None]), slots, strict=True)
        self.kept = torch.cat([tokens[:, slot].flatten() for tokens, slot in groups])
        self.slots = [slot.to(device) for slot in slots]
        self.spreads = [
            (slot.argsort() if j == math.prod(shape) else spread_to_window(shape, j)).to(device)
            for slot, (shape, j) in zip(slots, counts, strict=True)
        ]

    def spread(self, latents: Tensor) -> Tensor:
        """Latents (B, K, d) -> tokens (B, N, d): each takes the mean of the nearest kept ones."""
        groups = zip(self.windows.groups(latents, self.budget), self.spreads, strict=True)
        spread = [x[:, table] if table.ndim == 1 else table.to(x.dtype) @ x for x, table in groups]
        return joined([x.reshape(len(latents), -1, x.shape[2]) for x in spread], 1)


class KeptTokens:
    """The kept tokens of grids that follow each other in a sequence, each at its budget."""

    def __init__(self, grids: tuple[Shape, ...], window: Shape, budgets: tuple[int, ...], device: torch.device):
        self.grids = [KeptGrid(grid, window, budget, device) for grid, budget in zip(grids, budgets, strict=True)]
        self.tokens, self.latents = list(map(math.prod, grids)), [len(grid.kept) for grid in self.grids]
        firsts = list(zip(accumulate([0, *self.tokens]), self.grids, strict=False))
        order = torch.cat([first + grid.windows.order for first, grid in firsts])
        kept, to_core = torch.cat([first + grid.kept for first, grid in firsts]).sort()
        self.full = len(kept) == len(order)
        self.order, self.inverse, self.kept = order.to(device), order.argsort().to(device), kept.to(device)
        self.to_core, self.from_core = to_core.to(device), to_core.argsort().to(device)


kept_tokens = torch.compiler.disable(remembered(KeptTokens))


class ElasticInterface(LatentInterface):
    """Latents, Read and Write around the core of a pretrained transformer; J = n."""

    def __init__(self, width: int, num_heads: int, window: Shape, condition_width: int, *, carry: bool):
        super().__init__(width, num_heads, window, math.prod(window), condition_width)
        self.carry = carry
        if carry:
            nn.init.zeros_(self.latents)

    def forward(self, stage: str, *inputs: Any) -> Tensor:  # pyrefly: ignore[bad-override]
        """`start` or `finish` by name: what offloads weights watches a module's forward, and brings its own along."""
        return getattr(self, stage)(*inputs)

    def start(self, tokens: Tensor, c: Tensor, kept: KeptTokens) -> Tensor:
        """tokens (B, N, d), c (B, condition width) -> latents (B, K, d)."""
        chunks = zip(tokens[:, kept.order].split(kept.tokens, 1), kept.grids, strict=True)
        read = [self.read_grid(s, c.to(self.latents.dtype), grid) for s, grid in chunks]
        return joined(read, 1)[:, kept.to_core].to(tokens.dtype)

    def read_grid(self, s: Tensor, c: Tensor, grid: KeptGrid) -> Tensor:
        """Tokens (B, N, d) of a grid, window by window -> its latents (B, K, d)."""
        if not self.carry:
            return self.read(s.to(c.dtype), c, grid.windows, grid.budget)
        groups = zip(grid.slots, grid.windows.groups(s), grid.windows.crops(sliceable(self.position)), strict=True)
        latents = []
        for slots, tokens, position in groups:
            start = sliceable(self.latents)[: len(slots)] + tokens[:, slots].unflatten(0, (len(s), -1))  # (B, G, J̃, d)
            latents.append(self.reader(start, tokens + position, c))
        return joined(latents, 1)

    def finish(self, tokens: Tensor, start: Tensor, latents: Tensor, kept: KeptTokens) -> Tensor:
        """tokens (B, N, d) before Read; latents (B, K, d) before (`start`) and after the core -> tokens (B, N, d)."""
        before, after = (each[:, kept.from_core].split(kept.latents, 1) for each in (start, latents))
        chunks = zip(tokens[:, kept.order].split(kept.tokens, 1), before, after, kept.grids, strict=True)
        written = []
        for s, l_in, l_out, grid in chunks:
            if self.carry:
                # s + (l_out − l_in), in the order that gives back l_out to the bit where s = l_in.
                s = grid.spread(l_out) + (s - grid.spread(l_in))
            s, l_out = s.to(self.latents.dtype), l_out.to(self.latents.dtype)
            written.append(self.write(s, l_out, grid.windows, grid.budget))
        return joined(written, 1)[:, kept.inverse].to(tokens.dtype)


class LowRank(nn.Module):
    """LoRA (Hu et al. 2021), B·A·x for x (..., in): A (r, in) random, B (out, r) zero, so nothing changes at first."""

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x.to(self.down.weight.dtype)))

    def add(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """The hook on a linear layer."""
        return None if bypassed.get() else output + self(args[0]).to(output.dtype)


def add_low_rank(transformer: Model, rank: int, *, seed: int = 0) -> None:
    """Puts changes of rank `rank` on the linear layers of all blocks but their modulations."""
    if any(getattr(module, "fused_projections", False) for module in transformer.modules()):
        raise ValueError("cannot add low-rank changes to fused projections: unfuse_qkv_projections() first")
    changes = nn.ModuleDict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _, name, layer, stream in linear_layers(transformer):
            if stream != "sample" and LORA_WEIGHT not in name:
                change = LowRank(layer.in_features, layer.out_features, rank)
                changes[name.replace(".", "-")] = change
                layer.register_forward_hook(change.add)
    some = transformer.elastic.latents
    transformer.elastic.low_rank = changes.to(some.device, some.dtype)
