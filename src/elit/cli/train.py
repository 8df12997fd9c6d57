"""elit train"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from elit.cli.main import Command, option_value, parse as parse_arguments
from elit.config import TrainConfig, check_data, load_config
from elit.files import Json

PARTS = ("weights", "gradients", "optimizer", "average", "gathered", "noise", "activations", "activations_checkpointed")


@dataclass(frozen=True, kw_only=True)
class Args(Command):
    """Train a model on scikit-learn's digits, a folder of images, one sub-folder a class or flat, or what elit encode
    wrote. Every run writes its settings to config.yaml; give that file to repeat it, and options for what is to differ.

    Example: elit train --data digits --model.name ELIT-DiT-S/1 --model.hidden-size 48 --model.num-heads 2
    --model.depth 6 --steps 2000 --batch-size 64 --learning-rate 2e-3 --out runs/digits
    """

    config: Path | None = None  # YAML with settings as below, such as a run's config.yaml; or recipe:NAME.
    dry_run: bool = False  # Print parameters, memory of a device, TFLOPs, GPU-days instead; reads no data.
    devices: int = 1  # Devices of a dry run.
    device_tflops: float = 989.0  # Peak of one device in TFLOP/s; default an H100's in bf16.
    utilisation: float = 0.4  # Share of that peak which the run is assumed to reach.
    settings: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


def parse(arguments: Sequence[str]) -> Args:
    config = option_value(arguments, "--config")
    settings = load_config(config) if config else TrainConfig()
    return parse_arguments(Args, "train", arguments, default=Args(settings=settings))


def run(args: Args) -> Json | None:
    if args.dry_run:
        return _dry_run(args)
    check_data(args.settings.data)  # before imports of seconds
    from accelerate import PartialState

    from elit.evaluate.during import train

    train(args.settings)
    if not PartialState().is_main_process:
        return None
    model = str(Path(args.settings.out) / "model")
    if not args.json:
        print(f"Model: {model}")
    return {"model": model, "steps": args.settings.steps}


def _dry_run(args: Args) -> Json:
    from elit.costs.memory import estimate
    from elit.evaluate.tables import print_table

    settings = args.settings
    cost = estimate(settings, devices=args.devices, device_tflops=args.device_tflops, utilisation=args.utilisation)
    gib = {name: getattr(cost, "weights" if name == "gradients" else name) / 2**30 for name in (*PARTS, "peak")}
    if not args.json:
        groups = ", ".join(f"{count / 1e6:.2f}M {name}" for name, count in cost.groups.items())
        print(f"{settings.model.name}: {cost.parameters / 1e6:.1f}M parameters ({groups})")
        rows = [[name.replace("_", ", "), f"{value:.2f}"] for name, value in gib.items() if value]
        print_table(["memory of one device", "GiB"], rows)
        print(f"{cost.tflops:.1f} TFLOPs an iteration (3 × forward × batch {settings.batch_size})")
        print(f"{cost.device_days:.1f} GPU-days for {settings.steps:,} steps at {args.utilisation:.0%} of ", end="")
        print(f"{args.device_tflops:g} TFLOP/s: {cost.device_days / args.devices:.1f} days on {args.devices}")
    sums = {"parameters": cost.parameters, "groups": cost.groups, "tflops": cost.tflops, "gpu_days": cost.device_days}
    return {**sums, "gib": gib, "devices": args.devices}
