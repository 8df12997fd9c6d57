"""elit profile"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from elit.cli.checks import check_arguments
from elit.cli.main import check_device, show_progress
from elit.cli.main import parse as parse_arguments


@dataclass(frozen=True, kw_only=True)
class Args:
    """Measure what sampling a model takes on this machine, over budgets, batch sizes and guidances, and fit a cost
    model that predicts all other settings. The profile lies in the model's folder; elit.plan and elit sample
    --target-ms find it there.

    Example: elit profile runs/quickstart/model
    """

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a saved model or pipeline."""
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    """Images at a time; plans for others between them are as good, beyond them less so."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the network, as you will sample."""
    compile: bool = False
    """Of the network, as you will sample."""
    device: str | None = None
    """Such as cuda or cpu; default: cuda where there is one."""
    seconds: float = 60.0
    """How long to measure; three rounds at the least, however long they take."""
    json: bool = False
    """Print the profile as JSON last on stdout."""


def parse(arguments: Sequence[str]) -> Args:
    args: Args = parse_arguments(Args, "profile", arguments)
    check_arguments(args)
    return args


def run(args: Args) -> dict[str, Any]:
    from dataclasses import asdict

    import torch

    from elit.elastic.load_model import load_model
    from elit.files import check_writable
    from elit.planner.choose import network_folder
    from elit.planner.profile import profile_path, profile_recipe

    model = load_model(args.model, torch_dtype=getattr(torch, args.dtype)).to(check_device(args.device)).eval()
    folder = network_folder(args.model)
    assert folder is not None  # of a path
    path = profile_path(folder, profile_recipe(model, compile=args.compile))
    check_writable(path, "model")
    profile = measured(model, batch_sizes=args.batch_sizes, seconds=args.seconds, compile=args.compile)
    profile.save(folder)
    if not args.json:
        _print(profile)
        print(f"Profile: {path}")
    return {"path": str(path), "error": profile.error(held_out=True), **asdict(profile)}


def measured(model: Any, **options: Any) -> Any:
    """A profile of the model, with a bar while it is measured."""
    from elit.planner.profile import measure_profile

    with show_progress("measuring", round(options["seconds"])) as progress:
        return measure_profile(model, progress=progress, **options)


def _print(profile: Any) -> None:
    """Every run, measured and predicted; then the prices and the errors."""
    from elit.evaluate.report.tables import print_table

    headings = ("batch", "steps", "latents", "guidance", "held out", "ms", "predicted", "error")
    rows = [
        (
            *(str(row["batch"]), str(row["steps"]), str(row["budget"] or "all")),
            row["kind"] + (f" {row['weak']}" if row["weak"] else ""),
            "yes" if row["held_out"] else "",
            f"{row['ms']:.2f}",
            f"{row['predicted_ms']:.2f}",
            f"{row['predicted_ms'] / row['ms'] - 1:+.1%}",
        )
        for row in sorted(profile.rows, key=lambda row: row["held_out"])
    ]
    recipe = profile.recipe
    threads = f", {recipe['threads']} threads" if recipe["threads"] else ""
    compiled = ", compiled" if recipe["compiled"] else ""
    title = f"{recipe['device']}{threads}, {recipe['dtype']}{compiled}, torch {recipe['torch']}"
    print_table(headings, rows, title=f"{title}: medians of {profile.rounds} rounds")
    units = {"around": "GFLOP", "linear": "GFLOP", "attention": "GFLOP"}
    prices = (f"{price:.3g} ms a {units.get(name, '')} {name}" for name, price in profile.cost.prices.items() if price)
    how = "; calls and work side by side" if profile.cost.overlapping else ""
    print("Prices: " + ", ".join(" ".join(price.split()) for price in prices) + how)
    print(
        f"Mean error: {profile.error(held_out=False):.1%} of the runs fitted, "
        f"{profile.error(held_out=True):.1%} of {sum(row['held_out'] for row in profile.rows)} held out."
    )
