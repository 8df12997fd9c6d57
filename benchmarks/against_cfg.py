"""Savings of cheap guidance in CFG's wall-clock, beside the closed form's.

`elit.sample` itself runs; every step is one evaluation of the network with both branches.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from subjects import inference
from timing import take_turns

import elit
from elit.sampling.evaluations import sampling_flops

SCALE = 1.5


def options(parser: argparse.ArgumentParser) -> None:
    shapes = ["B:4-4-4", "XL:4-20-4"]
    parser.add_argument("--shapes", nargs="+", default=shapes, metavar="SIZE:SPLIT", help="head–core–tail: B:4-4-4")
    parser.add_argument("--sample-size", type=int, default=32, help="32 is 256px, 64 is 512px")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[8, 1])
    parser.add_argument("--steps", type=int, default=2)


def shape(text: str) -> tuple[str, tuple[int, ...]]:
    size, _, split = text.partition(":")
    parts = split.split("-")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"--shapes {text}: give SIZE:HEAD-CORE-TAIL, such as B:4-4-4")
    return size, tuple(map(int, parts))


def guidance(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Sampling with no guidance, CFG, and CCFG and AG whose weak branch has the smallest budget."""
    rows = []
    for size, split in [shape(text) for text in args.shapes]:
        model = inference(f"ELIT-DiT-{size}/2", args.sample_size, args, split=split)
        for batch in args.batch_sizes:
            rows += one_batch(model, size, split, batch, args)
    cheap = [row for row in rows if row["guidance"] == "ccfg"]
    keys = ("model", "batch_size", "saved", "saved_closed_form")
    return rows, {"ccfg": [{key: row[key] for key in keys} for row in cheap]}


def one_batch(
    model: Any, size: str, split: Sequence[int], batch: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    weak = model.budgets[0]
    kinds = {"none": None, "cfg": elit.CFG(SCALE), "ccfg": elit.CCFG(SCALE, weak), "ag": elit.AG(SCALE, weak)}
    y = torch.arange(batch) % model.config.num_classes
    cases = {kind: partial(elit.sample, model, y, steps=args.steps, guidance=guide) for kind, guide in kinds.items()}
    times = take_turns(cases, args.rounds, args.device)
    flops = {kind: sampling_flops(model, steps=args.steps, guidance=guidance) for kind, guidance in kinds.items()}
    return [
        {
            "model": f"ELIT-DiT-{size}/2 {'–'.join(map(str, split))}",
            "batch_size": batch,
            "guidance": kind,
            "weak_budget": weak if kind in ("ccfg", "ag") else None,
            "ms_per_image_step": 1e3 * times[kind].median / batch / args.steps,
            "spread": times[kind].spread,
            "gflops_per_image_step": flops[kind] / args.steps / 1e9,
            "saved": 1 - times[kind].median / times["cfg"].median,
            "saved_closed_form": 1 - flops[kind] / flops["cfg"],
        }
        for kind in kinds
    ]


def says(summary: dict[str, Any]) -> list[str]:
    return [
        f"CCFG, {row['model']}, batch {row['batch_size']}: saves {row['saved']:.1%} of CFG's wall-clock, "
        f"the closed form says {row['saved_closed_form']:.1%}"
        for row in summary["ccfg"]
    ]
