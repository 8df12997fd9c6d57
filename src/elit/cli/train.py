"""elit train"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from elit.cli.main import parse as parse_arguments
from elit.config import TrainConfig, load_config


@dataclass(frozen=True, kw_only=True)
class Args:
    """Train a model on scikit-learn's digits or a folder of images with one sub-folder a class. Every run writes its
    settings to config.yaml; give that file to repeat it, with options for what should differ.

    Example: elit train --data digits --model.name ELIT-DiT-S/1 --model.hidden-size 48 --model.num-heads 2
    --model.depth 6 --steps 2000 --batch-size 64 --learning-rate 2e-3 --out runs/digits
    """

    config: Path | None = None
    """YAML with any of the settings below, such as an earlier run's config.yaml."""
    json: bool = False
    """Print a result as JSON last on stdout."""
    settings: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


def parse(arguments: Sequence[str]) -> Args:
    settings = TrainConfig()
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            settings = load_config(arguments[i + 1])
        elif argument.startswith("--config="):
            settings = load_config(argument.removeprefix("--config="))
    return parse_arguments(Args, "train", arguments, default=Args(settings=settings))


def run(args: Args) -> dict[str, Any] | None:
    from accelerate import PartialState

    from elit.train import train

    train(args.settings)
    if not PartialState().is_main_process:
        return None
    model = str(Path(args.settings.out) / "model")
    if not args.json:
        print(f"Model: {model}")
    return {"model": model, "steps": args.settings.steps}
