"""elit elastify"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import tyro

from elit.cli.checks import check_arguments, check_output
from elit.cli.main import check_device
from elit.cli.main import parse as parse_arguments


@dataclass(frozen=True, kw_only=True)
class Args:
    """Give a trained DiT of this library a latent interface, fit it to the original, and show what each budget is worth
    before and after. For diffusers' pipelines see docs/elastify.md.

    Example: elit elastify runs/digits/model runs/elastic --read-after 1 --write-after 5 --window 4 4
    """

    model: Annotated[Path, tyro.conf.Positional] = Path()
    """A saved DiT without an interface, or a checkpoint of its run."""
    out: Annotated[Path, tyro.conf.Positional] = Path()
    """Folder for the elastified network; elit.load_elastic reads it."""
    overwrite: bool = False
    """Replace what is there, once the new is whole."""
    data: str = "digits"
    """What it was trained on: digits, a folder of images, or what elit encode wrote."""
    read_after: int = 1
    """Blocks before Read."""
    write_after: int = 5
    """Blocks before Write."""
    window: tuple[int, ...] = (4, 4)
    """Tokens of a group along each axis."""
    mode: str = "carry"
    """carry: latents start as the group's own tokens; learned: the paper's own."""
    weights: str = "all"
    """What is trained: all weights, the interface alone, or lora: it and low-rank changes of the blocks."""
    lora_rank: int = 16
    """Rank of those changes."""
    steps: int = 2000
    """Of training; 0 = only the surgery."""
    batch_size: int = 64
    """Samples a step."""
    learning_rate: float = 1e-3
    """At its highest; it falls to zero."""
    distillation: float = 20.0
    """Weight of the distillation loss beside the flow-matching loss."""
    samples: int = 200
    """How many are drawn at each budget to be scored; digits only."""
    seed: int = 0
    """Of weights, data order, noise and budgets."""
    device: str | None = None
    """Such as cuda or cpu; default: cuda where there is one."""
    json: bool = False
    """Print the table as JSON last on stdout."""


def parse(arguments: Sequence[str]) -> Args:
    args: Args = parse_arguments(Args, "elastify", arguments)
    check_arguments(args, steps=0)
    check_output(args.out)
    return args


def run(args: Args) -> dict[str, Any]:
    from elit.config import DistillConfig, TrainConfig
    from elit.elastic.distill import prepare_student
    from elit.elastic.distill_network import distill_network
    from elit.elastic.load_model import load_model
    from elit.elastic.runtime import original
    from elit.evaluate.report.tables import print_table
    from elit.files import check_new_output
    from elit.models.saved import save_model
    from elit.training.train import load_data

    for name, value in (("model", args.model), ("out", args.out)):
        if value == Path():
            raise ValueError(f"{name}: not given; elit elastify MODEL OUT")
    check_new_output(args.out, overwrite=args.overwrite, folder=True)
    names = ("read_after", "write_after", "window", "mode", "weights", "lora_rank", "batch_size", "learning_rate")
    settings = {name: getattr(args, name) for name in (*names, "distillation", "seed")}
    config = DistillConfig(steps=max(1, args.steps), trackers=(), preview_every=0, log_every=200, **settings)
    data = load_data(TrainConfig(data=args.data))
    student = load_model(args.model).to(check_device(args.device))
    prepare_student(student, config)
    quality = _quality_of(args, student, data)
    with original():
        reference = quality(student, None)
    budgets = list(dict.fromkeys(max(1, len(student.budgets) // part) for part in (1, 2, 4, 8, 16)))
    before = {count: quality(student, count) for count in budgets}
    start = time.perf_counter()
    if args.steps:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{args.out.name}.", dir=args.out.parent) as folder:
            student = distill_network(student, data, replace(config, out=folder))
    seconds = time.perf_counter() - start
    after = {count: quality(student, count) for count in budgets}
    if not all(math.isfinite(value) for scores in after.values() for value in scores.values()):
        raise FloatingPointError("the fitted network's velocities are not finite; give a smaller learning_rate")
    save_model(student, args.out)
    if not args.json:
        rows = [[str(count), *_cells(before[count]), *_cells(after[count])] for count in budgets]
        columns = [f"{name} {when}" for when in ("before", "after") for name in reference]
        print_table(["latents a window", *columns], rows)
        scores = ", ".join(f"{name} {value:.4g}" for name, value in reference.items())
        print(f"original: {scores}. Trained for {seconds:.0f} s. {args.out}: saved")
    return {
        **{"model": str(args.out), "seconds": round(seconds, 1), "original": reference},
        **{"before": before, "after": after},
    }


def _cells(scores: dict[str, float]) -> list[str]:
    return [f"{value:.4g}" for value in scores.values()]


def _quality_of(args: Args, student: Any, data: Any) -> Callable[[Any, int | None], dict[str, float]]:
    """Scores a network at a budget: its velocity's error to the original's, and on digits a classifier's accuracy.

    student: as elastify left it, so still the original too.
    """
    import torch

    from elit.data.digits import CLASSES, digits
    from elit.elastic.runtime import original
    from elit.evaluate.features import train_digit_classifier
    from elit.flow.path import interpolate
    from elit.sampling.sample import sample, seeded_noise

    noise = seeded_noise(list(range(64)), tuple(data.shape))
    images, y = data.__getitems__([i * len(data) // 64 for i in range(64)])
    images = images[:, 0] if images.ndim > noise.ndim else images  # of latents the mean
    t = torch.linspace(0.02, 0.98, 64)
    x, t, y = (part.to(student.device) for part in (interpolate(noise, images, t), t, y))
    with torch.no_grad(), original():
        right = student(x, t, y)
    judged = args.data == "digits" and args.samples > 0
    classifier = train_digit_classifier(digits(), seed=args.seed).model if judged else None

    def quality(model: Any, budget: int | None) -> dict[str, float]:
        with torch.no_grad():
            scores = {"error": (model(x, t, y, budget) - right).square().mean().sqrt().item()}
        if classifier is not None:
            labels = torch.arange(args.samples) % len(CLASSES)
            samples = sample(model, labels, steps=16, budget=budget, seed=args.seed).cpu()
            with torch.no_grad():
                scores["accuracy"] = (classifier(samples)[1].argmax(1) == labels).float().mean().item()
        return scores

    return quality
