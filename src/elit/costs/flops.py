"""Closed-form cost at a budget, equal to FlopCounterMode's: a multiply-add is 2, attention 4·d a pair; no more."""

import re
from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from elit.budgets import Budget, resolve_budget, training_budgets
from elit.config import require
from elit.models.hdit import MERGED, WideBlock
from elit.models.interface import LatentInterface
from elit.models.layers import CrossAttention, SelfAttention
from elit.models.mmdit import JointBlock, LastJointBlock
from elit.models.presets import create_model
from elit.models.transformer import Transformer
from elit.models.windows import Windows, as_size, windows_of

CPU = torch.device("cpu")
# Rows of one sample in a layer, by the first pattern in its name; any other layer has the length of its stage.
ROWS = {
    r"reader\.modulation": "shapes",
    r"modulation|conditioning\.(time|pooled)": "one",
    r"conditioning|\.text": "text",
    r"patch_embed|^final|reader\.attention\.kv|writer\.(attention\.(q|proj)|mlp)": "tokens",
    r"reader\.attention\.q": "queries",  # all windows of a shape have the same
    r"reader|writer": "latents",
    r"^merge|^split": "merged",
}
CELLS = {256: 32, 512: 64}  # pixels: cells of an f8 autoencoder
FEWEST = {256: 1, 512: 4}  # J_min of multi-budget training
PARAMETERS = {"DiT-XL/2": 675e6, "ELIT-DiT-XL/2": 698e6, "U-ViT-XL/2": 707e6, "ELIT-U-ViT-XL/2": 730e6}
PARAMETERS["HDiT-XL/2"] = 1.4e9
# Training TFLOPs an iteration, 3 × forward × batch: at 256px and at 512px.
TRAINING = {
    "DiT-XL/2": (182, 806),
    "ELIT-DiT-XL/2": (188, 831),
    "ELIT-DiT-XL/2 MB": (190, 804),
    "U-ViT-XL/2": (196, 861),
    "ELIT-U-ViT-XL/2": (202, 886),
    "ELIT-U-ViT-XL/2 MB": (204, 858),
    "HDiT-XL/2": (182, 776),
    "ELIT-HDiT-XL/2": (188, 801),
    "ELIT-HDiT-XL/2 MB": (191, 791),
}
# ELIT-Qwen-Image with CCFG over Qwen-Image with CFG at 1024px, by share of the latents.
QWEN_IMAGE = {1.0: 0.688, 0.5: 0.494, 0.25: 0.409, 0.125: 0.369}
QWEN_IMAGE_WEAK = 4  # J̃_w, latents per window of the unconditional branch
# The part that a layer outside of blocks belongs to, by the start of its name; any other is before Read.
PARTS = {"latent_interface": "interface", "merge": "core", "split": "core", "final": "after"}


def meta_model(name: str, sample_size: int | Sequence[int] | None = None) -> Transformer:
    """A preset without weights in memory."""
    with torch.device("meta"):
        return create_model(name, sample_size=sample_size)


def count_flops(
    model_or_name: Transformer | str, *, sample_size: int | Sequence[int] | None = None, budget: Budget = None
) -> int:
    """Floating-point operations of one forward of one sample, for a text-conditional network of text_length tokens.

    model_or_name: a network, or the name of a preset. sample_size: default the network's own; a named ELIT preset
    takes the paper's window for that size, an existing network keeps its own. budget: as in the network's forward.

    Raises ValueError for an unknown name, a size that does not divide, a budget that is not valid, or another network.
    """
    model = meta_model(model_or_name, sample_size) if isinstance(model_or_name, str) else model_or_name
    valid = "a network of this library or the name of a preset; see also elit.elastic.cost.count_block_flops"
    require(isinstance(model, Transformer), "model_or_name", type(model).__name__, valid)
    size = model.sample_size if sample_size is None else as_size(sample_size)
    latents = resolve_budget(budget, model.budgets)
    foreign = any(type(each).__module__.partition(".")[0] != "elit" for each in (model, *model.blocks))
    if foreign and not hasattr(model, "elastic_record"):
        return traced_flops(model, size, latents)
    total = flops_by_part(model, size, latents).total()
    # A baseline of this library may have been given a dial.
    return total + (model.added_flops(size, budget) if hasattr(model, "elastic_record") else 0)


@torch.no_grad()
def traced_flops(model: Transformer, size: Sequence[int], num_latents: int | None) -> int:
    """FLOPs of a forward with layers of others, which no closed form knows: torch's count on tensors without data."""
    weights = {name: torch.empty_like(each, device="meta") for name, each in model.state_dict().items()}
    with torch.random.fork_rng(devices=[]):
        y = model.conditioning.example(1).to("meta")
    inputs = torch.empty(1, model.config.in_channels, *size, device="meta"), torch.empty(1, device="meta"), y
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(model, weights, (*inputs, num_latents))
    return counter.get_total_flops()


def shared_flops(model: Transformer, *, sample_size: int | Sequence[int] | None = None) -> int:
    """FLOPs that branches which differ in the budget alone share: all before Read, or its end."""
    size = model.sample_size if sample_size is None else as_size(sample_size)
    return flops_by_part(model, size, model.budgets[-1])["before"] if model.spec else 0


def count_interface_flops(interface: LatentInterface, grid: Sequence[int], budget: Budget = None) -> int:
    """FLOPs of Read and Write in one forward of one sample with `grid` tokens along each axis; the core is its owner's.

    Raises ValueError as the interface's forward does.
    """
    latents = resolve_budget(budget, range(1, len(interface.latents) + 1))
    sees, total = lengths(windows_of(tuple(grid), interface.window, 1, CPU), latents), 0
    for name, module in interface.named_modules():
        if isinstance(module, nn.Linear):
            total += 2 * rows_of(name, sees, 0) * module.weight.numel()
        elif isinstance(module, CrossAttention):
            total += 4 * sees["pairs"] * module.proj.in_features
    return total


def lengths(windows: Windows, kept: int | None, read: int | None = None) -> Counter[str]:
    """Rows of each kind of one sample with `kept` latents of a full window in the core; `read`: of more in Read."""
    sees = Counter(one=1, tokens=prod(windows.grid), shapes=len(windows.shapes))
    if kept is None:
        return sees + Counter(core=sees["tokens"])
    both = windows.latents(kept), windows.latents(read or kept)
    for (shape, count), j, j_read in zip(windows.shapes, *both, strict=True):
        sees.update(core=count * j, queries=j_read, latents=count * j_read, pairs=count * prod(shape) * j_read)
    return sees


def rows_of(name: str, sees: Counter[str], otherwise: int) -> int:
    """Rows of one sample that the layer called `name` sees."""
    return next((sees[kind] for pattern, kind in ROWS.items() if re.search(pattern, name)), otherwise)


def flops_by_part(model: Transformer, size: Sequence[int], num_latents: int | None) -> Counter[str]:
    """FLOPs of all "before" what depends on the budget, of the "interface", the "core" and all "after" it."""
    windows = windows_of(model.token_grid(size), model.window(size), model.budget_step, CPU)
    num_latents = num_latents if model.spec else None  # an elastified baseline's budgets are no latents of its own
    sees = lengths(windows, num_latents, model.spec.num_latents if model.spec and model.reads_all else None)
    sees["text"] = model.config.get("text_length", 0)
    sees["merged"] = sees["core"] // MERGED
    head, core = (len(blocks) for blocks in model.stages()[:2])
    total, counted = Counter[str](), (nn.Linear, SelfAttention, CrossAttention, JointBlock, LastJointBlock)
    for name, module in model.named_modules():
        first, number, *_ = f"{name}.".split(".")
        if not isinstance(module, counted) or first == "elastic" or "lora_" in name:
            continue
        part, merged = PARTS.get(first, "before"), 1
        if model.reads_all and number == "reader":
            part = "before"
        if first == "blocks" and number:
            part = "before" if int(number) < head else "core" if int(number) < head + core else "after"
            merged = MERGED if isinstance(model.blocks[int(number)], WideBlock) else 1
        length = sees["core" if part == "core" else "tokens"] // merged
        rows = rows_of(name, sees, length)
        if isinstance(module, nn.Linear):
            total[part] += 2 * rows * module.in_features * module.out_features
        elif isinstance(module, SelfAttention):
            total[part] += 4 * rows**2 * module.proj.in_features
        elif isinstance(module, CrossAttention):
            total[part] += 4 * sees["pairs"] * module.proj.in_features
        else:
            ways = 1 if isinstance(module, LastJointBlock) else 2  # the image attends to the text, or each to the other
            total[part] += ways * 4 * length * sees["text"] * module.image.attention.proj.in_features
    return total


def training_tflops(model: Transformer, batch_size: int, budgets: Sequence[Budget]) -> float:
    """TFLOPs of an iteration, 3 × forward × batch, mean over the budgets drawn."""
    costs = [count_flops(model, budget=budget) for budget in budgets]
    return 3 * batch_size * sum(costs) / len(costs) / 1e12


class Figure(NamedTuple):
    """A cost figure of the paper (section 4 and 5, Table 1 and Qwen-Image's) beside ours."""

    row: str
    paper: float
    ours: float

    @property
    def difference(self) -> float:
        return self.ours / self.paper - 1


def paper_figures() -> list[Figure]:
    """Every cost figure of the paper and ours, in closed form: nothing is allocated."""
    counts = {name: sum(parameter.numel() for parameter in meta_model(name).parameters()) for name in PARAMETERS}
    rows = [Figure(f"{name}, parameters", paper, counts[name]) for name, paper in PARAMETERS.items()]
    for name, figures in TRAINING.items():
        for pixels, paper in zip(CELLS, figures, strict=True):
            rows.append(Figure(f"{name}, {pixels}px, training TFLOPs", paper, paper_tflops(name, pixels)))
    # The paper's figure comes out if Read and Write are counted for all latents; ours does no work for dropped ones.
    model = meta_model("ELIT-DiT-XL/2", 64)
    every, kept = (flops_by_part(model, model.sample_size, count)["interface"] for count in (64, 16))
    quarter = paper_tflops("ELIT-DiT-XL/2", 512, 0.25) + 3 * 256 * (every - kept) / 1e12
    label = "ELIT-DiT-XL/2, 512px, 25% of the tokens (Read and Write of all), training TFLOPs"
    rows.append(Figure(label, 386, quarter))
    qwen, plain = meta_model("ELIT-MM-DiT-Qwen-Image/2"), 2 * count_flops("MM-DiT-Qwen-Image/2")
    for share, ratio in QWEN_IMAGE.items():
        ours = (count_flops(qwen, budget=share) + count_flops(qwen, budget=QWEN_IMAGE_WEAK)) / plain
        rows.append(Figure(f"ELIT-Qwen-Image, {share:.1%} of the latents, CCFG over Qwen-Image with CFG", ratio, ours))
    return rows


def paper_tflops(name: str, pixels: int, budget: Budget = None) -> float:
    """An iteration of the paper's training: batch 256; "… MB", multi-budget, batch 384 and the mean over its draws."""
    model = meta_model(name.removesuffix(" MB"), CELLS[pixels])
    if not name.endswith(" MB"):
        return training_tflops(model, 256, [budget])
    return training_tflops(model, 384, training_budgets(model.budgets, FEWEST[pixels], None))
