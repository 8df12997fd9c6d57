"""elit distill"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from elit.cli.main import parse as parse_arguments
from elit.config import DistillConfig, load_config


@dataclass(frozen=True, kw_only=True)
class Args:
    """Give a pretrained diffusers pipeline a compute dial: its transformer learns to work on fewer tokens. What it
    learns is a small file, OUT/elastic.safetensors; the pipeline stays as it is. It learns from what the pipeline draws
    for --prompts, or from pictures, --data. PIPELINE and OUT may come first, without their option names. Run it again
    with --resume after a kill.

    Example: elit distill runs/tiny-flux runs/dial --prompts runs/tiny-flux/prompts.txt --steps 500
    """

    config: Path | None = None
    """YAML with any of the settings below, such as an earlier run's config.yaml."""
    dry_run: bool = False
    """Print what the run takes instead, from the transformer's config alone: memory of a device by part, TFLOPs,
    GPU-days."""
    devices: int = 1
    """Devices of a dry run."""
    device_memory: float = 80.0
    """GB of one device, for a dry run to say what fits."""
    device_tflops: float = 989.0
    """Peak of one device in TFLOP/s; default an H100's in bf16."""
    utilisation: float = 0.4
    """Share of that peak which the run is assumed to reach."""
    push_to_hub: str | None = None
    """Upload the add-on and its card to this hub repository at the end, USER/NAME."""
    json: bool = False
    """Print a result as JSON last on stdout."""
    settings: Annotated[DistillConfig, tyro.conf.arg(name="")] = field(default_factory=DistillConfig)


def parse(arguments: Sequence[str]) -> Args:
    words, named = list(arguments), []
    for option in ("--pipeline", "--out"):
        if words and not words[0].startswith("-"):
            named += [option, words.pop(0)]
    settings = DistillConfig()
    for i, argument in enumerate(words):
        if argument == "--config" and i + 1 < len(words):
            settings = load_config(words[i + 1], DistillConfig)
        elif argument.startswith("--config="):
            settings = load_config(argument.removeprefix("--config="), DistillConfig)
    return parse_arguments(Args, "distill", [*named, *words], default=Args(settings=settings))


def run(args: Args) -> dict[str, Any] | None:
    if args.dry_run:
        return _dry_run(args)
    from accelerate import PartialState

    from elit.elastic.distill import distill
    from elit.evaluate.report.add_on_card import push, write_card

    if args.push_to_hub is not None and args.push_to_hub.count("/") != 1:
        raise ValueError(f"push_to_hub={args.push_to_hub!r}: give USER/NAME")
    result = distill(args.settings)
    if not PartialState().is_main_process:
        return None
    write_card(args.settings, result["validation"])
    if args.push_to_hub:
        result["url"] = push(args.settings.out, args.push_to_hub)
    if not args.json:
        print(f"{args.settings.out}: saved; elit.load_elastic(pipe, {args.settings.out!r}) puts it into a pipeline")
    return result


def _dry_run(args: Args) -> dict[str, Any]:
    from dataclasses import asdict

    from elit.elastic.estimate import estimate
    from elit.evaluate.report.tables import print_table

    config = args.settings
    result = estimate(config, devices=args.devices)
    rows, parts = [], []
    for part in result.parts:
        fits = part.peak < args.device_memory * 1e9
        spread = "sharded" if part.sharded else "copied" if args.devices > 1 else "one device"
        sizes = [
            part.base,
            part.trained,
            part.gradients,
            part.optimizer,
            part.activations,
            part.activations_checkpointed,
        ]
        cells = [f"{size / 1e9:.1f}" for size in (*sizes, part.peak)]
        rows.append([f"{part.weights}, {spread}", *cells, "yes" if fits else "no"])
        parts.append(asdict(part) | {"peak": part.peak, "fits": fits})
    seconds = (result.tflops * config.steps + result.recording_tflops) / (args.device_tflops * args.utilisation)
    days = seconds / 86_400
    if not args.json:
        print(
            f"{result.kind}: {result.parameters / 1e9:.2f}B parameters, {result.blocks} blocks, {result.tokens} image "
            f"and {result.text_tokens} text tokens, batch {config.batch_size} on {args.devices}"
        )
        names = ["base", "trained", "gradients", "Adam", "activations", "checkpointed", "peak"]
        print_table(["GB of one device", *names, f"fits {args.device_memory:g}"], rows)
        print("peak: with --gradient-checkpointing; base: the original's weights, in bf16")
        print(f"{result.tflops:.0f} TFLOPs a step with lora; {result.recording_tflops:.0f} to record the trajectories")
        speed = f"{args.utilisation:.0%} of {args.device_tflops:g} TFLOP/s"
        print(f"{days:.2f} GPU-days for {config.steps:,} steps at {speed}")
    return asdict(result) | {"parts": parts, "gpu_days": days, "devices": args.devices}
