"""elit flops"""

from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

from elit.budgets import format_budget, resolve_budget
from elit.cli.main import Command
from elit.config import require_counts
from elit.costs.flops import count_flops, paper_figures
from elit.elastic.load import load_model
from elit.evaluate.tables import print_table
from elit.files import Json
from elit.models.presets import create_model
from elit.pretrained import model_folder

COLUMNS = {
    "model": "{model}",
    "budget": "{share}",
    "latents/window": "{tokens_per_group}",
    "GFLOPs": "{gflops:.4g}",
    "of full": "{of_full:.1%}",
    "TFLOPs/iteration": "{training_tflops:.4g}",
    "parameters": "{parameters:,}",
}
OF_PAPER = {"figure": "{row}", "paper": "{paper:.4g}", "ours": "{ours:.4g}", "difference": "{difference:+.2%}"}


@dataclass(frozen=True, kw_only=True)
class Args(Command):
    """Print a model's cost at each budget: GFLOPs of one forward of one sample (multiply-add = 2), their share of the
    full cost, TFLOPs of a training iteration (3 × forward × batch 256), and parameters.

    Example: elit flops ELIT-DiT-XL/2 --sample-size 64 --budgets 100% 50% 25%
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ("DiT-XL/2", "ELIT-DiT-XL/2")  # Presets or saved models.
    sample_size: tuple[int, ...] = ()  # One number for squares, three for video (frames rows columns): cells or pixels.
    budgets: tuple[str, ...] = ("100%", "75%", "50%", "25%", "12.5%", "6.25%")  # Latents a window (8) or shares (50%).
    paper: bool = False  # Print the paper's cost figures instead, with ours and the difference.

    def __post_init__(self) -> None:
        require_counts(self, "sample_size")


def run(args: Args) -> list[Json]:
    if args.paper:
        rows: list[Json] = [{**each._asdict(), "difference": each.difference} for each in paper_figures()]
    else:
        rows = [row for name in args.models for row in _cost_rows(args, name)]
    columns = OF_PAPER if args.paper else COLUMNS
    if not args.json:
        shown = [{**row, "share": format_budget(row["budget"]) if row.get("budget") else ""} for row in rows]
        cells = [[cell.format(**row).replace("None", "") for cell in columns.values()] for row in shown]
        print_table(list(columns), cells)
    return rows


def _cost_rows(args: Args, name: str) -> list[Json]:
    size = args.sample_size[0] if len(args.sample_size) == 1 else args.sample_size or None
    if model_folder(name).is_dir():
        model = load_model(name)
    else:
        with torch.device("meta"):
            model = create_model(name, sample_size=size)
    budgets = dict.fromkeys(resolve_budget(text, model.budgets) for text in args.budgets) if model.budgets else [None]
    full, parameters = count_flops(model, sample_size=size), sum(each.numel() for each in model.parameters())
    rows: list[Json] = []
    for budget in budgets:
        flops = count_flops(model, sample_size=size, budget=budget)
        share = None if budget is None else budget / model.budgets[-1]
        row: Json = {"model": name, "budget": share, "tokens_per_group": budget, "gflops": flops / 1e9}
        row |= {"of_full": flops / full, "training_tflops": 3 * 256 * flops / 1e12, "parameters": parameters}
        rows.append(row)
    return rows
