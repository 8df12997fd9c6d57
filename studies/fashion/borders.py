"""What windows that do not divide cost in quality: the boxed model on canvases of 28 to 48 pixels.

    python studies/fashion/borders.py [--count 256] [--out studies/results/borders.json]

Test pictures lie in the middle of a black canvas. The loss is that of flow matching on the picture's own 28×28 pixels,
at the same noise and times on every canvas. Windows of 4×4 tokens (8×8 pixels) divide 32, 40 and 48; 28, 36 and 44 have
windows of 3 tokens among them. A canvas other than 32 is one that the model was never trained at, which costs too: so
what the smaller windows cost is the loss at 36 and at 44 over the mean of their two neighbours.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import elit
from elit.data.idx import fashion_mnist
from elit.files import write_text
from elit.flow.path import interpolate

CANVASES = (28, 32, 36, 40, 44, 48)
BUDGETS = (1.0, 0.5, 0.25)
PICTURE, LARGEST = 28, max(CANVASES)


def on_canvas(images: Tensor, side: int, value: float) -> Tensor:
    """The middle of images (B, 1, H, W) of any size on a canvas of side × side."""
    border = (side - images.shape[-1]) // 2
    return F.pad(images, (border,) * 4, value=value)


@torch.no_grad()
def losses(model: elit.DiT, images: Tensor, labels: Tensor, side: int, budget: float) -> Tensor:
    """(B,): of each picture, at a time of its own."""
    generator = torch.Generator().manual_seed(0)
    noise = on_canvas(torch.randn(len(images), 1, LARGEST, LARGEST, generator=generator), side, 0.0)
    t = torch.sigmoid(torch.randn(len(images), generator=generator))
    x = on_canvas(images, side, -1.0)
    velocity = model(interpolate(noise, x, t), t, labels, budget=budget)
    return on_canvas((velocity - (x - noise)).square(), PICTURE, 0.0).flatten(1).mean(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=256, help="test pictures")
    parser.add_argument("--out", type=Path, help="also write the losses to this file, as JSON")
    args = parser.parse_args()
    model, data = elit.load_model("fashion").float().eval(), fashion_mnist("test")
    images, labels = data.__getitems__(range(args.count))
    images = on_canvas(images, PICTURE, 0.0)
    rows = []
    for budget in BUDGETS:
        means = {side: losses(model, images, labels, side, budget) for side in CANVASES}
        print(f"{budget:.0%}:", ", ".join(f"{side}: {means[side].mean():.4f}" for side in CANVASES), flush=True)
        row: dict[str, object] = {"budget": budget, "losses": {side: means[side].mean().item() for side in CANVASES}}
        for side in (36, 44):
            ratio = means[side] - (means[side - 4] + means[side + 4]) / 2
            error = ratio.std() / len(ratio) ** 0.5
            share = (ratio.mean() / means[32].mean()).item()
            print(f"    at {side}: {share:+.2%} ± {error / means[32].mean():.2%} of the loss at 32", flush=True)
            row[f"cost_at_{side}"] = share
        rows.append(row)
    if args.out:
        write_text(args.out, json.dumps({"count": args.count, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
