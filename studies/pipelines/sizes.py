"""Real token grids that windows do not divide, on narrow random networks: 83×83, 104×58 and Wan's 21×30×52.

At full budget the output is the original's to the bit; the error rises as the budget falls; FLOPs are within 2% of the
closed form (counted on shapes alone). Wan's grid has 32,760 tokens, and takes minutes of a core: --skip-video.

    python studies/pipelines/sizes.py [--skip-video]
"""

import argparse
import copy
from typing import Any

import torch
from parts import build
from tiny import TEXT, inputs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import elit
from elit.elastic.cost import count_block_flops

GRIDS = {
    "QwenImageTransformer2DModel": ((83, 83), (104, 58)),
    "FluxTransformer2DModel": ((83, 83), (104, 58)),
    "WanTransformer3DModel": ((21, 30, 52),),
}
WINDOWS = {"WanTransformer3DModel": (2, 4, 4)}
BUDGETS = (1.0, 0.5, 0.25, 0.125)


def pair(kind: str) -> tuple[Any, Any]:
    original = build(kind)
    split: dict[str, Any] = {"read_after": 1, "write_after": 3, "window": WINDOWS.get(kind, (8, 8))}
    return original, elit.elastify(copy.deepcopy(original), **split)


def errors(kind: str, grid: tuple[int, ...]) -> list[float]:
    """Root mean square of the difference to the original at each budget."""
    original, elastic = pair(kind)
    x = inputs(kind, batch=1, grid=grid)
    with torch.no_grad():
        right, found = original(**x).sample, []
        for budget in BUDGETS:
            with elit.budget(budget):
                found.append((elastic(**x).sample - right).square().mean().sqrt().item())
    return found


def flops(kind: str, grid: tuple[int, ...], budget: float) -> tuple[int, int]:
    """Counted in a forward on shapes alone, and by the closed form; of what lies between the embedders."""
    original, elastic = (model.to("meta") for model in pair(kind))
    x = {
        name: value.to("meta") if isinstance(value, torch.Tensor) and name != "img_ids" else value
        for name, value in inputs(kind, batch=1, grid=grid).items()
    }

    def measured(model: Any) -> int:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(**x)
        return int(counter.get_total_flops())

    counted = {"tokens": (grid,), "text_tokens": TEXT}
    rest = measured(original) - count_block_flops(elastic, **counted, interface=False)
    kept = round(budget * elastic.budgets[-1])
    with elit.budget(kept):
        return measured(elastic) - rest, count_block_flops(elastic, **counted, budget=kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-video", action="store_true", help="its errors; FLOPs take no time")
    args = parser.parse_args()
    for kind, grids in GRIDS.items():
        for grid in grids:
            line = f"{kind} {'×'.join(map(str, grid))}: FLOPs over the closed form"
            if kind != "FluxTransformer2DModel":
                ratios = [seen / said for seen, said in (flops(kind, grid, budget) for budget in BUDGETS)]
                print(line, ", ".join(f"{ratio:.4f}" for ratio in ratios), flush=True)
            if not (args.skip_video and kind.startswith("Wan")):
                found = errors(kind, grid)
                print(
                    f"{kind} {'×'.join(map(str, grid))}: error",
                    ", ".join(f"{error:.3g}" for error in found),
                    flush=True,
                )


if __name__ == "__main__":
    main()
