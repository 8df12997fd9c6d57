"""Quality lost by windows that do not divide: the loss of the boxed model with its windows, and with smaller ones.

    python studies/fashion/borders.py [--count 256] [--out studies/results/borders.json]

The loss is that of flow matching on the 28×28 pixels of test pictures, at the same noise and times. Three cases:

    32          the size that the model was trained at: 16×16 tokens in windows of 4×4
    32, recut   the same, each axis cut into 3, 3, 3, 3 and 4 tokens: smaller windows and nothing else
    28          14×14 tokens, cut into 3, 4, 3 and 4: smaller windows, and a size that it was never trained at
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import elit
from elit.data.builtin import fashion_mnist
from elit.files import write_text
from elit.flow.path import interpolate
from elit.models import transformer, windows

BUDGETS = (1.0, 0.5, 0.25, 0.125)
PICTURE, TRAINED = 28, 32


def on_canvas(images: Tensor, side: int, value: float) -> Tensor:
    """The middle of images (B, 1, H, W) of any size on a canvas of side × side."""
    border = (side - images.shape[-1]) // 2
    return F.pad(images, (border,) * 4, value=value)


@torch.inference_mode()  # keeps no tables
def losses(model: elit.DiT, images: Tensor, labels: Tensor, side: int, budget: float) -> Tensor:
    """(B,): of each picture, at a time of its own."""
    generator = torch.Generator().manual_seed(0)
    noise = on_canvas(torch.randn(len(images), 1, TRAINED, TRAINED, generator=generator), side, 0.0)
    t = torch.sigmoid(torch.randn(len(images), generator=generator))
    x = on_canvas(images, side, -1.0)
    velocity = model(interpolate(noise, x, t), t, labels, budget=budget)
    return on_canvas((velocity - (x - noise)).square(), PICTURE, 0.0).flatten(1).mean(1)


@contextmanager
def recut() -> Iterator[None]:
    """Cuts an axis into one window more than needed inside the block."""
    plain = windows.count_parts
    with (
        patch.object(windows, "count_parts", lambda length, side: plain(length, side) + 1),
        patch.object(transformer, "windows_of", windows.Windows),  # none that are kept
    ):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=256, help="test pictures")
    parser.add_argument("--out", type=Path, help="also write the losses to this file, as JSON")
    args = parser.parse_args()
    images, labels = fashion_mnist("test").__getitems__(range(args.count))
    images = on_canvas(images, PICTURE, 0.0)
    cases = (("32", 32, nullcontext()), ("32, recut", 32, recut()), ("28", 28, nullcontext()))
    table: dict[str, dict[float, Tensor]] = {}
    for name, side, cutting in cases:
        model = elit.load_model("fashion").float().eval()
        with cutting:
            table[name] = {budget: losses(model, images, labels, side, budget) for budget in BUDGETS}
    rows = []
    for budget in BUDGETS:
        reference = table["32"][budget]
        for name, of_case in table.items():
            change = (of_case[budget] - reference) / reference.mean()
            error = change.std() / len(change) ** 0.5
            print(f"{budget:.1%} {name}: loss {of_case[budget].mean():.4f}, {change.mean():+.2%} ± {error:.2%}")
            rows.append(
                {"budget": budget, "case": name, "loss": of_case[budget].mean().item(), "change": change.mean().item()}
            )
    if args.out:
        write_text(args.out, json.dumps({"count": args.count, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
