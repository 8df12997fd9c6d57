"""Claim 1: zero-padding an image to 4× the tokens gives DiT nothing, ELIT uses the extra tokens (paper Figure 2).

The digits as 4×4 tokens of 2×2 pixels, with and without a frame of zeros that makes 8×8 tokens of them. The network
pads its input and crops its output, so that loss and samples are those of the digit alone. Positions are absolute and
learned, without RoPE. ELIT has one window and as many latents as tokens: 16, and padded 64, all of them free to read
from the 16 tokens that hold the digit. What padding costs in FLOPs is the question, so arms with and without it have
the same steps and batch, not the same FLOPs.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from arms import SIZES, SPLIT, run_config, train_or_load
from command import arguments
from record import Record, Values
from scoring import draw, held_out_loss, score
from torch import Tensor, nn

from elit.config import ModelConfig
from elit.costs.flops import count_flops
from elit.models.dit import DiT
from elit.models.layers import Rope
from elit.models.windows import Windows

DIGIT, PATCH = 8, 2
NOTHING = 0.01  # a gain below this share of the loss without padding is none


class Placed(nn.Module):
    """Tokens with a learned vector added for their place."""

    def __init__(self, linear: nn.Linear, tokens: int):
        super().__init__()
        self.linear, self.in_features, self.out_features = linear, linear.in_features, linear.out_features
        self.position = nn.Parameter(0.5 * torch.randn(tokens, linear.out_features))

    @property
    def weight(self) -> Tensor:
        """The network looks at its type."""
        return self.linear.weight

    def forward(self, patches: Tensor) -> Tensor:
        return self.linear(patches) + self.position


class AbsoluteDiT(DiT):
    """DiT, or ELIT-DiT, with absolute positions; its canvas is the digit and what is padded at the right and below."""

    canvas = DIGIT

    def build(self) -> None:
        self.register_to_config(sample_size=self.canvas)
        super().build()
        self.patch_embed = Placed(self.patch_embed, (self.canvas // PATCH) ** 2)  # pyrefly: ignore[bad-assignment]

    def rope(self, windows: Windows, budget: int | None = None) -> Rope:
        cos, sin = super().rope(windows, budget)
        return Rope(torch.ones_like(cos), torch.zeros_like(sin))  # turns nothing

    def token_grid(self, size: Sequence[int]) -> tuple[int, ...]:
        return super().token_grid((self.canvas, self.canvas))  # whatever the size of what is to be padded

    def forward(self, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        side = x.shape[-1]
        padding = (0, self.canvas - side, 0, self.canvas - side)
        return super().forward(F.pad(x, padding), *rest, **options)[..., :side, :side]


class PaddedDiT(AbsoluteDiT):
    canvas = 2 * DIGIT


def main(line: Sequence[str] | None = None) -> None:
    args = arguments(line, __doc__, __file__)
    record = Record(args, 1, "one window, all latents; absolute positions; 16 Euler steps, no guidance")

    def gain(values: Values, seed: int, kind: str, metric: str) -> float:
        return values[kind, metric][seed] - values[f"{kind}, padded", metric][seed]

    for metric in ("loss", "FD"):

        def nothing(values: Values, seed: int, metric: str = metric) -> float:
            return NOTHING * values["DiT", metric][seed] - gain(values, seed, "DiT", metric)

        def something(values: Values, seed: int, metric: str = metric) -> float:
            return gain(values, seed, "ELIT", metric) - NOTHING * values["ELIT", metric][seed]

        record.part(f"padding lowers DiT's {metric} by less than {NOTHING:.0%}", metric, nothing)
        record.part(f"padding lowers ELIT's {metric} by more than {NOTHING:.0%}", metric, something)

    sizes = SIZES
    plain = ModelConfig(name="DiT-S/2", **sizes)
    elit = ModelConfig(name="ELIT-DiT-S/2", window=(4, 4), split=SPLIT, **sizes)
    arms = {
        "DiT": (plain, AbsoluteDiT),
        "DiT, padded": (plain, PaddedDiT),
        "ELIT": (elit, AbsoluteDiT),
        "ELIT, padded": (replace(elit, window=(8, 8)), PaddedDiT),
    }
    for seed in range(args.seeds):
        for name, (model, network) in arms.items():
            budget = {"budget_min": model.window[0] ** 2} if model.window else {}
            config = run_config(args, seed, model, **budget)
            trained = train_or_load(args, config, network)
            flops = 3 * count_flops(trained, sample_size=network.canvas)
            record.arm(name, config, tflops=flops * config.batch_size * config.steps / 1e12)
            scores = score(*draw(trained, args.samples, steps=16))
            record.add(name, seed, loss=held_out_loss(args, trained), **scores)
        record.save(range(seed + 1))


if __name__ == "__main__":
    main()
