"""Draws the pictures of README: the model in the box at five budgets, and its quality against its cost.

    python studies/fashion/pictures.py      # docs/figures/fashion-strip.png, docs/figures/fashion-curve.png

The curve is of the sweep's table beside the model.
"""

import argparse
from pathlib import Path

import torch
from runs import ROOT

import elit
from elit.evaluate import plots
from elit.evaluate.sweep import read_table
from elit.pretrained import HERE

TABLE = HERE / "fashion" / "sweep.jsonl"
SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625)
STEPS, SCALE, SEED = 24, 2.0, 11


def draw_strip(path: Path) -> None:
    """A row a budget, a column a class, the same noise in every row."""
    model = elit.load_model("fashion")
    names = model.config.class_names
    full, rows = elit.count_flops(model), []
    for share in SHARES:
        guidance = elit.CCFG(SCALE, 1)
        images = elit.sample(model, names, steps=STEPS, budget=share, guidance=guidance, seed=SEED)
        cost = elit.count_flops(model, budget=share) / full
        rows.append((f"{100 * share:.4g}%\n{cost:.2f}× FLOPs", images))
    plots.samples_by_budget(rows, names, path)


def draw_curve(path: Path) -> None:
    """The Fréchet distance of every point of the sweep against the GFLOPs of a sample, with the front."""
    # Milliseconds are left out: the sweep ran beside other work.
    plots.compute_quality(read_table(TABLE), "fd", path, plots.COSTS[:1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures", help="folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    draw_strip(args.out / "fashion-strip.png")
    if TABLE.is_file():
        draw_curve(args.out / "fashion-curve.png")


if __name__ == "__main__":
    main()
