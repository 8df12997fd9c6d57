"""Scores a model of the Fashion-MNIST recipe for its card: 5,000 samples a row; killed and started again, it goes on.

    OMP_NUM_THREADS=1 nice -n 19 python studies/fashion/card.py runs/fashion-box/model

In 8 and in 4 steps: all budgets without guidance, and the three largest with each kind of it. It takes two hours and a
half of one core. Writes MODEL/sweep.jsonl and MODEL/README.md, as `elit sweep` does.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import elit
from elit.budgets import parse_budget
from elit.cli.main import show_progress
from elit.elastic.load import load_network
from elit.evaluate.chunks import Work
from elit.evaluate.detectors import FashionDetector
from elit.evaluate.reference import FASHION_REFERENCE, load_reference
from elit.evaluate.report import write_card
from elit.evaluate.samples import Sampler
from elit.evaluate.score import MetricGroup
from elit.evaluate.sweep import make_settings, sweep, write_table
from elit.files import write_text

ALL = ("100%", "50%", "25%", "12.5%", "6.25%")
SWEEPS: tuple[dict[str, Any], ...] = (
    {"budgets": ALL, "steps": (8, 4), "guidance": (None,)},
    {"budgets": ALL[:3], "steps": (8, 4), "guidance": (elit.CFG(1.5), elit.AG(1.5, 1), elit.CCFG(1.5, 1))},
)
TRAINING = "\n## How it was trained\n"


def main(line: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/fashion-card"), help="samples and scores")
    parser.add_argument("--count", type=int, default=5000, help="samples a row")
    args = parser.parse_args(line)
    torch.set_num_threads(1)

    model, _ = load_network(args.model, dtype=torch.bfloat16)
    work = Work(out=args.out, chunk=25, batch_size=250)
    sampler, detector = Sampler(model, work, compile=True), FashionDetector()
    settings = []
    for each in SWEEPS:
        options: dict[str, Any] = each | {"budgets": [parse_budget(budget) for budget in each["budgets"]]}
        settings += make_settings(sampler, **options)
    metrics = ("fd", "precision", "recall", "accuracy")
    reference = load_reference(FASHION_REFERENCE, detector)
    group = MetricGroup(specification="fashion-mnist", detector=detector, reference=reference, metrics=metrics)
    with show_progress(f"{len(settings)} settings", len(settings) * args.count) as progress:
        points, _ = sweep(sampler, settings, [group], count=args.count, progress=progress)
    write_table(points, args.model / "sweep.jsonl")
    card = args.model / "README.md"
    _, heading, training = card.read_text(encoding="utf-8").partition(TRAINING) if card.is_file() else ("", "", "")
    about: dict[str, Any] = {"license": "mit", "datasets": ["zalando-datasets/fashion_mnist"]}
    write_card(args.model, model, points, "fd", reference="fashion-mnist", instead=args.out / "README.md", **about)
    write_text(card, card.read_text(encoding="utf-8") + heading + training)
    print(f"{card}: {len(points)} rows of {args.count:,} samples")


if __name__ == "__main__":
    main()
