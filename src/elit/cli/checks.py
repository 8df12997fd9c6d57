"""What can be told from a command's arguments alone: said before torch is imported, in a tenth of a second.

Each function looks at the options of one kind, by name, and passes over those that a command does not have. Commands
call `check_arguments` in their `parse`; what only the model or the data can say comes later. Imports nothing heavy:
tests/cli/test_startup.py asks.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elit.arguments import class_numbers
from elit.budgets import ANY_COUNT, schedule_budgets
from elit.config import MAX_COUNT, require
from elit.files import check_writable, whole_folder
from elit.pretrained import model_folder

LEAST = {
    "steps": 1,
    "count": 1,
    "batch_size": 1,
    "chunk": 1,
    "frames": 1,
    "shard_size": 1,
    "image_size": 1,
    "draws": 1,
    "bins": 1,
    "devices": 1,
}
"""Whole numbers that have a least value; options that take several have it for each."""
ABOVE_ZERO = ("shift", "target_ms", "target_images_per_s", "target_gflops", "device_tflops", "mean_gflops")
BUDGETS = ("budget", "budgets", "schedules", "guidance_budget", "step_budgets", "sample_budgets")
DATA = ("digits", "moving-digits", "fashion-mnist")
OWN_SAMPLES = "samples"  # of the model itself: elit inspect
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
"""Of `elit.sampling.pictures.FORMATS`, which loads pillow."""


def check_arguments(args: Any, **least: int) -> None:
    """Looks at every option of `args` that it knows. least: of numbers, where it is another than `LEAST`.

    Raises ValueError, one line that names the option, its value and what would be valid.
    """
    given = {name: value for name, value in vars(args).items() if value is not None}
    check_numbers(given, LEAST | least)
    for name in BUDGETS:
        for text in _each(given.get(name, ())):
            schedule_budgets(text, [0.0], ANY_COUNT)
    check_guidance(given)
    check_guidance_is_used(args)
    for name in ("model", "vae"):
        if isinstance(folder := given.get(name), Path) and folder != Path():
            check_saved_folder(model_folder(folder) if name == "model" else folder, name)
    check_labels(given)
    data = given.get("data")
    named = data in (*DATA, OWN_SAMPLES) or str(data).startswith("idx:")
    if isinstance(data, str) and not named and not Path(data).exists():
        raise ValueError(f"data={data!r}: no such folder; give one, or any of {', '.join(DATA)}")


def check_numbers(given: Mapping[str, Any], least: Mapping[str, int]) -> None:
    """Numbers that have bounds."""
    for name, value in given.items():
        for number in _each(value):
            require(not isinstance(number, float) or math.isfinite(number), name, number, "finite")
            if name in least:
                require(number >= least[name], name, number, f"at least {least[name]}")
                require(number <= MAX_COUNT, name, number, f"at most {MAX_COUNT}")
            require(name not in ABOVE_ZERO or number > 0, name, number, "above 0")
            require(name not in ("cache", "caches") or number >= 0, name, number, "at least 0")
            require(name != "times" or 0 <= number <= 1, name, number, "in [0, 1]; 0 = noise, 1 = data")


def check_guidance(given: Mapping[str, Any]) -> None:
    """The scale of guidance and the times between which it acts."""
    for name in ("scale", "scales"):
        for scale in _each(given.get(name, ())):
            if not scale >= 0:
                raise ValueError(f"{name}={scale:g}: give a number >= 0; 1 is off")
    if "guidance_interval" in given:
        low, high = given["guidance_interval"]
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval={low:g} {high:g}: need 0 <= low <= high <= 1")


def check_guidance_is_used(args: Any) -> None:
    """No option of guidance that would do nothing beside `args.guidance`, one kind or several."""
    if not hasattr(args, "guidance"):
        return
    kinds = {args.guidance} if isinstance(args.guidance, str) else set(args.guidance)
    names = ("scale", "scales", "guidance_budget", "guidance_interval")
    given = [name for name in names if hasattr(args, name) and getattr(args, name) != getattr(type(args), name)]
    if given and kinds <= {"none"}:
        raise ValueError(
            f"{given[0]}={getattr(args, given[0])!r}: goes with a guidance; add --guidance cfg, ag or ccfg"
        )
    if "guidance_budget" in given and kinds <= {"none", "cfg"}:
        raise ValueError(
            f"guidance_budget={args.guidance_budget!r}: cfg keeps the first branch's; use --guidance ag or ccfg"
        )


def check_saved_folder(folder: Path, name: str) -> None:
    """Whether `folder` may be a saved model, pipeline or autoencoder; its files are looked at when it is loaded."""
    where = whole_folder(folder)
    if not where.is_dir():
        raise ValueError(f"{name}={str(folder)!r}: no such folder")
    files = ("config.json", "model_index.json", "elastic.json", "transformer/elastic.json")  # the last two: an add-on
    if not any((where / file).is_file() for file in files):
        raise ValueError(f"{name}={str(folder)!r}: no config.json in it; give a folder that save_pretrained wrote")


def check_labels(given: Mapping[str, Any]) -> None:
    """Numbers and names of classes, where the model's config.json says how many there are."""
    folder = given.get("model", given.get("pictures"))
    if not given.get("labels") or not isinstance(folder, Path):
        return
    where = whole_folder(model_folder(folder))
    if (where / "model_index.json").is_file():
        where = where / "transformer"
    try:
        config = json.loads((where / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # what is wrong with it is said when the model is loaded
    classes = config.get("num_classes") if isinstance(config, dict) else None
    if isinstance(classes, int):
        for label, number in zip(
            given["labels"], class_numbers(given["labels"], config.get("class_names") or (), classes), strict=True
        ):
            if not 0 <= number <= classes:
                raise ValueError(f"labels={label}: labels are 0 to {classes - 1}, and {classes} for no class")


def check_output(out: Path, name: str = "out") -> None:
    """Whether something can be written at `out`, or in it where it is a folder. Raises ValueError."""
    check_writable(out / "file" if out.is_dir() or out.is_symlink() else out, name)


def check_sample_files(out: Path) -> None:
    """Whether samples can be written as `out` is named; which of them the model's can is known when it is loaded."""
    if out.suffix.lower() not in (*PICTURES, ".npz", ""):
        raise ValueError(
            f"out={str(out)!r}: give a {', '.join(PICTURES)} for pictures, a .npz for an array, or a folder"
        )


def _each(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
