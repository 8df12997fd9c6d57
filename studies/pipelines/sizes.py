"""Real token grids that windows do not divide, on narrow random networks: 83×83, 104×58 and Wan's 21×30×52.

At full budget the output is the original's to the bit; the error rises as the budget falls; FLOPs are within 2% of the
closed form (counted on shapes alone). Wan's grid has 32,760 tokens; its network has three blocks and one head.

    python studies/pipelines/sizes.py [--only Wan]
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
    """A network of random weights, and it with the dial."""
    video = kind.startswith("Wan")
    original = build(kind, **{"num_layers": 3, "num_attention_heads": 1} if video else {})
    split: dict[str, Any] = {"read_after": 1, "write_after": 2 if video else 3, "window": WINDOWS.get(kind, (8, 8))}
    return original, elit.elastify(copy.deepcopy(original), **split)


def errors(kind: str, grid: tuple[int, ...]) -> list[float]:
    """Root mean square of the difference to the original at each budget."""
    original, elastic = pair(kind)
    x = inputs(kind, batch=1, grid=grid)
    with torch.no_grad():
        right, differences = original(**x).sample, []
        for budget in BUDGETS:
            with elit.budget(budget):
                differences.append((elastic(**x).sample - right).square().mean().sqrt().item())
    return differences


def flops(kind: str, grid: tuple[int, ...], budget: float) -> tuple[int, int]:
    """Counted in a forward on shapes alone, and by the closed form; of what lies between the embedders."""
    original, elastic = (model.to("meta") for model in pair(kind))
    x = {
        name: value.to("meta") if isinstance(value, torch.Tensor) and not name.endswith("_ids") else value
        for name, value in inputs(kind, batch=1, grid=grid).items()
    }
    if kind.startswith("Flux"):  # its grid is told from what the coordinates are
        for model in (original, elastic):
            model.pos_embed.register_forward_hook(lambda module, args, out: tuple(each.to("meta") for each in out))

    def measured(model: Any) -> int:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(**x)
        return int(counter.get_total_flops())

    counted = {"tokens": (grid,), "text_tokens": TEXT}
    rest = measured(original) - count_block_flops(elastic, **counted, interface=False)
    num_latents = round(budget * elastic.budgets[-1])
    with elit.budget(num_latents):
        return measured(elastic) - rest, count_block_flops(elastic, **counted, budget=num_latents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="classes with this in their names")
    args = parser.parse_args()
    for kind, grids in GRIDS.items():
        for grid in grids if args.only in kind else ():
            name = f"{kind} {'×'.join(map(str, grid))}"
            ratios = [seen / said for seen, said in (flops(kind, grid, budget) for budget in BUDGETS)]
            print(f"{name}: FLOPs over the closed form", ", ".join(f"{ratio:.4f}" for ratio in ratios), flush=True)
            print(f"{name}: error", ", ".join(f"{error:.3g}" for error in errors(kind, grid)), flush=True)


if __name__ == "__main__":
    main()
