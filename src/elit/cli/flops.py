"""elit flops"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated, Any

import tyro

from elit.cli.checks import check_arguments
from elit.cli.main import check_device
from elit.cli.main import parse as parse_arguments


@dataclass(frozen=True, kw_only=True)
class Args:
    """What a model costs at each budget: GFLOPs of one forward of one sample (multiply-add = 2), its share of the full
    cost, TFLOPs of a training iteration (3 × forward × batch 256), parameters, and on request measured milliseconds.

    Example: elit flops ELIT-DiT-XL/2 --sample-size 64 --budgets 100% 50% 25%
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ("DiT-XL/2", "ELIT-DiT-XL/2")
    """Names of presets, or folders of saved models."""
    sample_size: tuple[int, ...] = ()
    """One number for square images, three for video (frames rows columns), in autoencoder cells or pixels."""
    budgets: tuple[str, ...] = ("100%", "75%", "50%", "25%", "12.5%", "6.25%")
    """Latents per group (8; 1 is one latent) or shares of them (50%)."""
    paper: bool = False
    """Print the paper's cost figures instead, ours and the difference."""
    measure: bool = False
    """Also time a forward on this machine."""
    batch_size: int = 1
    """Samples of a timed forward."""
    device: str | None = None
    """Device of the timing; default: cuda where there is one."""
    json: bool = False
    """Print the rows as JSON last on stdout."""


def parse(arguments: Sequence[str]) -> Args:
    args: Args = parse_arguments(Args, "flops", arguments)
    check_arguments(args)
    idle = [
        each.name
        for each in fields(args)
        if each.name not in ("paper", "json") and getattr(args, each.name) != each.default
    ]
    if args.paper and idle:
        raise ValueError(
            f"{idle[0]}: the paper's figures are of its own networks and budgets; leave it out, or --paper"
        )
    return args


def run(args: Args) -> list[dict[str, Any]]:
    from elit.evaluate.report.tables import print_table

    if args.paper:
        return _paper(args)
    rows = [row for model in args.models for row in _model_rows(args, model)]
    if not args.json:
        headings = ["model", "budget", "latents/group", "GFLOPs", "of full", "TFLOPs/iteration", "parameters"]
        cells = [
            [
                row["model"],
                "" if row["budget"] is None else f"{100 * row['budget']:.4g}%",
                "" if row["tokens_per_group"] is None else str(row["tokens_per_group"]),
                f"{row['gflops']:.4g}",
                f"{row['of_full']:.1%}",
                f"{row['training_tflops']:.4g}",
                f"{row['parameters'] / 1e6:.1f}M",
                *([f"{row['ms']:.1f}"] if args.measure else []),
            ]
            for row in rows
        ]
        print_table(headings + (["ms/sample"] if args.measure else []), cells)
    return rows


def _paper(args: Args) -> list[dict[str, Any]]:
    from elit.costs.paper import paper_figures
    from elit.evaluate.report.tables import print_table

    figures = paper_figures()
    if not args.json:
        cells = [[f.row, f"{f.paper:.4g}", f"{f.ours:.4g}", f"{f.difference:+.2%}"] for f in figures]
        print_table(["figure", "paper", "ours", "difference"], cells)
    return [{"row": f.row, "paper": f.paper, "ours": f.ours, "difference": f.difference} for f in figures]


def _model_rows(args: Args, name: str) -> list[dict[str, Any]]:
    from elit.budgets import resolve_budget
    from elit.costs.flops import count_flops, valid_budgets
    from elit.costs.parameters import count_parameters
    from elit.models.presets import model_config
    from elit.pretrained import model_folder

    size = None if not args.sample_size else args.sample_size[0] if len(args.sample_size) == 1 else args.sample_size
    if model_folder(name).is_dir():
        from elit.elastic.load import load_model

        model: Any = load_model(name)
        budgets, parameters = model.budgets, sum(parameter.numel() for parameter in model.parameters())
    else:  # by its name alone: neither torch nor a network
        model, (kind, config) = name, model_config(name, sample_size=size)
        budgets, parameters = valid_budgets(kind, config), count_parameters(kind, config)
    measure = _clock(args, model, size) if args.measure else None
    counts = dict.fromkeys(resolve_budget(budget, budgets) for budget in args.budgets) if budgets else [None]
    full = count_flops(model, sample_size=size)
    rows = []
    for count in counts:
        flops = count_flops(model, sample_size=size, budget=count)
        row: dict[str, Any] = {
            "model": name,
            "budget": None if count is None else count / budgets[-1],
            "tokens_per_group": count,
            "gflops": flops / 1e9,
            "of_full": flops / full,
            "training_tflops": 3 * 256 * flops / 1e12,
            "parameters": parameters,
        }
        if measure is not None:
            row["ms"] = measure(budget=count)
        rows.append(row)
    return rows


def _clock(args: Args, model: Any, size: Any) -> Callable[..., float]:
    """Milliseconds of a forward at a budget, measured on this machine."""
    import torch

    from elit.costs.timing import measure_ms
    from elit.models.presets import create_model

    device = check_device(args.device)
    if isinstance(model, str):
        with torch.device(device):
            model = create_model(model, sample_size=size)
    return partial(measure_ms, model.to(device), sample_size=size, batch_size=args.batch_size)
