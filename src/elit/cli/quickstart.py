"""elit quickstart: trains a small ELIT network, samples it at every budget, and writes scores and a report."""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from elit.budgets import resolve_budget
from elit.cli.main import Output
from elit.config import TrainConfig, load_config, require_counts, save_config
from elit.data.builtin import CAPTIONS, CLASSES, digits, moving_digits
from elit.data.images import ImageSet
from elit.evaluate import plots
from elit.evaluate.chunks import Work
from elit.evaluate.detectors import ClipDetector, ImageDetector, centred, train_digit_classifier
from elit.evaluate.inspect.attention import read_attention
from elit.evaluate.pictures import data_pictures
from elit.evaluate.reference import measure_reference
from elit.evaluate.report import Section, cells, headings, write_page
from elit.evaluate.samples import Sampler
from elit.evaluate.score import MetricGroup
from elit.evaluate.sweep import Point, sweep
from elit.evaluate.tables import print_table
from elit.files import Json, check_new_output, write_folder, write_text
from elit.flow.guidance import CCFG
from elit.flow.path import interpolate
from elit.models.conditioning import Condition
from elit.models.transformer import Transformer
from elit.sampling.engine import seeded_noise
from elit.sampling.sample import sample
from elit.sampling.settings import Sampling
from elit.training.train import train

SAMPLES = 200  # Scored at each setting; of clips, which take longer, half as many.
SAMPLING_STEPS = 16
SHARES = ("100%", "50%", "25%", "12.5%", "6.25%")
NEXT = {
    "draw more, with half of the latents": "sample {model}{of} --count 16 --budget 50% --out half.png",
    "turn the budget in a browser": "play {model}",
    "see which settings pay": "sweep {model}{of} --reference {data} --count 96 --steps 4 8 16",
    "train on your own pictures": "train --data FOLDER --image-size 32 --horizontal-flip --out runs/own",
}
STRIPS = (2, 5, 7)  # the digits whose clips are shown frame by frame
# Files and folders of a quickstart; a folder that holds anything else is not replaced.
PRODUCTS = (
    *("model", "checkpoints", "samples", "logs", "config.yaml", "metrics.jsonl", "results.json"),
    *("samples.png", "samples.gif", "compute_quality.png", "read_attention.png", "report.html"),
)
# Title and text of the report's pictures.
PICTURES = {
    "samples.png": ("The same noise at every budget", "Only the number of latents changes, with CCFG."),
    "compute_quality.png": ("Compute against quality", "Fréchet distance of classifier features; lower is better."),
    "read_attention.png": ("Attention of the latents", "Read attention at t = 0.7 for six digits."),
}


@dataclass(frozen=True, kw_only=True)
class Args(Output):
    """Train a small multi-budget ELIT network on scikit-learn's digits, sample it at every budget, score the samples
    and write a report. Takes two to four minutes on two CPU cores and needs no download.

    Example: elit quickstart --backbone uvit --out runs/uvit
    """

    backbone: Literal["dit", "uvit", "hdit", "mmdit", "video"] = "dit"  # mmdit takes captions, video moves the digits.
    out: Path = Path("runs/quickstart")  # Folder for model/, config.yaml, results.json, the pictures and report.html.
    steps: int | None = None  # Training steps; default: as many as the backbone needs.
    seed: int = 0  # Seed of everything; the same seed on the same machine gives the same numbers.

    def __post_init__(self) -> None:
        require_counts(self, "steps")
        self.training(self.out)  # checks the seed

    @property
    def clips(self) -> bool:
        return self.backbone == "video"

    def training(self, out: Path) -> TrainConfig:
        recipe = load_config(f"recipe:quickstart/{self.backbone}")
        steps = self.steps or recipe.steps
        return replace(recipe, out=str(out), steps=steps, checkpoint_every=steps, seed=self.seed)


def run(args: Args) -> Json:
    check_new_output(args.out, overwrite=args.overwrite, folder=True, mine=PRODUCTS.__contains__)
    write_folder(args.out, lambda folder: run_into(folder, args))
    results = json.loads((args.out / "results.json").read_text(encoding="utf-8"))
    if not args.json:
        print(f"Report: {args.out / 'report.html'}  ({results['seconds']:.0f} s)")
    return results


def run_into(out: Path, args: Args) -> None:
    """All of a quickstart, in a folder that is renamed to `args.out` in the end."""
    start, config, still = time.perf_counter(), args.training(out), digits()
    data = moving_digits() if args.clips else still
    cut_out = ImageSet(centred(still.images), still.labels, still.classes) if args.clips else still
    classifier = train_digit_classifier(cut_out, seed=args.seed)
    print(f"Training {config.model.name}, small, for {config.steps} steps on {len(data):,} samples.", file=sys.stderr)
    model = train(config).cpu()
    conditions = model.conditioning.prepare(CAPTIONS if model.takes_text else list(range(10)))
    budgets = list(dict.fromkeys(resolve_budget(share, model.budgets) or 0 for share in SHARES))
    guidance = CCFG(2.0 if args.clips else 1.5, budgets[-1])
    plain = [Sampling(steps=SAMPLING_STEPS, budget=budget, seed=args.seed) for budget in budgets]
    guided = [replace(each, guidance=guidance) for each in plain]
    detector = (ClipDetector if args.clips else ImageDetector)(classifier.model)
    with tempfile.TemporaryDirectory() as folder:
        work = Work(out=Path(folder), chunk=50)
        reference = measure_reference(data_pictures(data, config.data), detector, work)
        metrics = ("fd", "accuracy", "steady") if args.clips else ("fd", "accuracy")
        group = MetricGroup(config.data, detector, reference, metrics)
        sampler = Sampler(model, work, conditions=conditions)
        settings = [each for pair in zip(plain, guided, strict=True) for each in pair]
        count = SAMPLES // 2 if args.clips else SAMPLES
        points = sweep(sampler, settings, [group], count=count)[0]
    draw(out, model, data, conditions, guided, points)
    columns, rows = headings(metrics), [cells(point, metrics) for point in points]
    lead = f"{config.model.name}, small: trained for {config.steps} steps, then sampled at {len(budgets)} budgets."
    sections = [Section(*PICTURES[name], out / name) for name in PICTURES]
    text = f"{count} samples a row, {SAMPLING_STEPS} Euler steps; cost is of a whole sample, guidance included."
    sections.append(Section("The numbers", text, headings=columns, rows=rows))
    of = ' --prompts "a handwritten seven"' if model.takes_text else ""
    known: Json = {"model": args.out / "model", "of": of, "data": config.data}
    commands = [(purpose, f"elit {line.format(**known)}") for purpose, line in NEXT.items()]
    sections.append(Section("What to try next", "Every command has --help.", headings=("to", "command"), rows=commands))
    write_page(out / "report.html", "One model, many budgets: handwritten digits", lead, sections)
    save_config(args.training(args.out), out / "config.yaml")
    results: Json = {"backbone": args.backbone, "seconds": round(time.perf_counter() - start, 1)}
    results |= {"classifier_accuracy": classifier.accuracy, "samples": count, "sampling_steps": SAMPLING_STEPS}
    of = [{"budget": each.share, "tokens_per_group": int(each.budget), "guidance": each.guidance} for each in points]
    costs = [{"gflops_per_image": each.gflops, "ms_per_image": each.ms} | each.scores for each in points]
    results["rows"] = [left | right for left, right in zip(of, costs, strict=True)]
    write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    if not args.json:
        print_table(columns, rows)


def draw(
    out: Path,
    model: Transformer,
    data: ImageSet,
    conditions: Condition,
    samplings: Sequence[Sampling],
    points: Sequence[Point],
) -> None:
    """samples.png (of clips a strip of frames), compute_quality.png, read_attention.png."""
    clips, full = len(data.shape) == 4, model.budgets[-1]
    rows = [(f"{each.budget} of\n{full} latents", sample(model, conditions, sampling=each)) for each in samplings]
    if clips:
        rows = [(label, samples[list(STRIPS)]) for label, samples in rows]
    plots.samples_by_budget(rows, [CLASSES[digit] for digit in STRIPS] if clips else CLASSES, out / "samples.png")
    plots.compute_quality(points, "fd", out / "compute_quality.png")

    first = torch.stack([(data.labels == label).nonzero()[0, 0] for label in range(6)])
    images, y, t = data.images[first], conditions[data.labels[first]], torch.full((len(first),), 0.7)
    x = interpolate(seeded_noise([samplings[0].seed] * len(first), data.shape), images, t)
    maps = read_attention(model, x, t, y)
    if clips:  # the first frame of each
        x, maps = x[:, :, 0], maps[:, :, 0]
    slots = [*range(3), *range(full - 3, full)]
    plots.read_attention(x, maps, slots, out / "read_attention.png")
