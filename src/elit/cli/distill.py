"""elit distill"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from elit.cli.main import Command, option_value, parse as parse_arguments
from elit.config import DistillConfig, check_data, load_config
from elit.files import Json


@dataclass(frozen=True, kw_only=True)
class Args(Command):
    """Give a pretrained diffusers pipeline a compute dial: its transformer learns to work on fewer tokens. The result
    is a small file, OUT/elastic.safetensors; the pipeline stays as it is. It learns from samples that the pipeline
    makes for --prompts, or from pictures, --data. A DiT of this library takes the --data it was trained on, and becomes
    OUT/model. PIPELINE and OUT may come first, without their option names. Run it again with --resume after a kill.

    Example: elit distill runs/tiny-flux runs/dial --prompts runs/tiny-flux/prompts.txt --steps 500
    """

    config: Path | None = None  # YAML with any of the settings below, such as an earlier run's config.yaml.
    push_to_hub: str | None = None  # Upload the add-on and its card to this hub repository at the end, USER/NAME.
    settings: Annotated[DistillConfig, tyro.conf.arg(name="")] = field(default_factory=DistillConfig)

    def __post_init__(self) -> None:
        if self.push_to_hub is not None and self.push_to_hub.count("/") != 1:
            raise ValueError(f"push_to_hub must be USER/NAME, got {self.push_to_hub!r}")


def parse(arguments: Sequence[str]) -> Args:
    words, named = list(arguments), []
    for option in ("--pipeline", "--out"):
        if words and not words[0].startswith("-"):
            named += [option, words.pop(0)]
    config = option_value(words, "--config")
    settings = load_config(config, DistillConfig) if config else DistillConfig()
    return parse_arguments(Args, "distill", [*named, *words], default=Args(settings=settings))


def run(args: Args) -> Json | None:
    if args.settings.data is not None:
        check_data(args.settings.data)
    from accelerate import PartialState

    from elit.elastic.distill import distill
    from elit.evaluate.tables import print_table, push, write_card

    result, out = distill(args.settings), args.settings.out
    if not PartialState().is_main_process:
        return None
    if "model" not in result:
        write_card(args.settings, result["validation"])
        if args.push_to_hub:
            result["url"] = push(out, args.push_to_hub)
        if not args.json:
            print(f"{out}: saved; elit.load_elastic(pipe, {out!r}) puts it into a pipeline")
    elif not args.json:
        names = ("tokens", "distance_before", "distance")
        rows = [[f"{row[name]:.4g}" for name in names] for row in result["validation"]]
        print_table(["tokens a window", "distance to the original before", "after"], rows)
        print(f"{result['model']}: saved; elit.load_elastic({result['model']!r}) reads it")
    return result
