"""The paper's cost figures (section 4 and 5, Table 1 and Qwen-Image's) beside what this code comes to."""

from dataclasses import dataclass

from elit.budgets import Budget, training_budgets
from elit.costs.flops import count_flops, flops_by_part, meta_model, training_tflops

CELLS = {256: 32, 512: 64}  # pixels: cells of an f8 autoencoder
FEWEST = {256: 1, 512: 4}  # J_min of multi-budget training
PARAMETERS = {
    "DiT-XL/2": 675e6,
    "ELIT-DiT-XL/2": 698e6,
    "U-ViT-XL/2": 707e6,
    "ELIT-U-ViT-XL/2": 730e6,
    "HDiT-XL/2": 1.4e9,
}
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
QWEN_IMAGE_WEAK = 4  # J̃_w, latents per group of the unconditional branch


@dataclass(frozen=True)
class Figure:
    row: str
    paper: float
    ours: float

    @property
    def difference(self) -> float:
        return self.ours / self.paper - 1


def paper_figures() -> list[Figure]:
    """Every cost figure of the paper and ours, in closed form: nothing is allocated."""
    rows = []
    for name, paper in PARAMETERS.items():
        ours = sum(parameter.numel() for parameter in meta_model(name).parameters())
        rows.append(Figure(f"{name}, parameters", paper, ours))
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
