"""elit quickstart: trains a small ELIT network, samples it at every budget, and writes scores and a report."""

import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from elit.cli.main import check_output
from elit.config import ModelConfig, TrainConfig, require_counts, save_config
from elit.data.builtin import CAPTIONS, CLASSES, digits, moving_digits
from elit.data.images import ImageSet
from elit.evaluate import plots, sheets
from elit.evaluate.chunks import Work
from elit.evaluate.detectors import ClipDetector, ImageDetector, TrainedClassifier, centred, train_digit_classifier
from elit.evaluate.inspect.attention import read_attention
from elit.evaluate.pictures import data_pictures
from elit.evaluate.plane import Point
from elit.evaluate.reference import measure_reference
from elit.evaluate.report.html import Section, write_page
from elit.evaluate.report.sweep import cells, headings
from elit.evaluate.report.tables import print_table
from elit.evaluate.samples import Sampler
from elit.evaluate.score import MetricGroup
from elit.evaluate.sweep import sweep
from elit.files import Json, check_new_output, write_folder, write_text
from elit.flow.guidance import CCFG, Guidance
from elit.flow.path import interpolate
from elit.models.conditioning import Condition
from elit.models.transformer import Transformer
from elit.sampling.engine import seeded_noise
from elit.sampling.sample import sample
from elit.sampling.settings import Sampling
from elit.training.train import train

SAMPLING_STEPS = 16
STRIPS = (2, 5, 7)  # the digits whose clips are shown frame by frame
# Files and folders of a quickstart; a folder that holds anything else is not replaced.
PRODUCTS = (
    *("model", "checkpoints", "samples", "logs", "config.yaml", "metrics.jsonl", "results.json"),
    *("samples.png", "samples.gif", "compute_quality.png", "read_attention.png", "report.html"),
)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Train a small multi-budget ELIT network on scikit-learn's digits, sample it at every budget, score the samples
    and write a report. Takes two to four minutes on two CPU cores and needs no download.

    Example: elit quickstart --backbone uvit --out runs/uvit
    """

    backbone: Literal["dit", "uvit", "hdit", "mmdit", "video"] = "dit"
    """Kind of network: mmdit makes digits from captions ("a handwritten seven"), video moves them over a canvas."""
    out: Path = Path("runs/quickstart")
    """Folder for model/, config.yaml, results.json, the pictures and report.html."""
    overwrite: bool = False
    """Replace that folder, once the new one is whole."""
    steps: int | None = None
    """Training steps; default: as many as the backbone needs."""
    seed: int = 0
    """Seed of everything; the same seed on the same machine gives the same numbers."""
    json: bool = False
    """Print the content of results.json last on stdout."""

    def __post_init__(self) -> None:
        require_counts(self, "steps")
        self.training(self.out)  # checks the seed

    @property
    def recipe(self) -> "Recipe":
        return RECIPES[self.backbone]

    def training(self, out: Path) -> TrainConfig:
        """The training run, in the folder `out`."""
        recipe = self.recipe
        settings: Json = TRAINING | recipe.training | ({"steps": self.steps} if self.steps else {})
        settings |= {"data": recipe.data, "preview_every": 0, "checkpoint_every": settings["steps"], "seed": self.seed}
        return TrainConfig(out=str(out), model=ModelConfig(name=recipe.name, **recipe.model), **settings)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The network of a quickstart, and the budgets it is sampled at."""

    title: str
    name: str
    """Preset of its kind of network."""
    model: Json
    """Its sizes."""
    data: str = "digits"
    training: Json = field(default_factory=dict)
    """Differences to `TRAINING`."""
    budgets: tuple[int, ...] = (16, 8, 4, 2, 1)
    samples: int = 200
    """Scored at each setting."""
    scale: float = 1.5
    """Guidance scale."""

    @property
    def guidance(self) -> Guidance:
        """CCFG with the smallest budget in the unconditional branch."""
        return CCFG(self.scale, self.budgets[-1])

    @property
    def clips(self) -> bool:
        return self.data == "moving-digits"


TRAINING = {"steps": 700, "batch_size": 32, "learning_rate": 4e-3, "warmup_steps": 50, "ema_decay": 0.99}
SMALL = {"hidden_size": 48, "num_heads": 2, "depth": 6, "split": (1, 4, 1)}
FOUR_WINDOWS = SMALL | {"window": (4, 4)}  # one for each quarter of a digit
RECIPES = {
    "dit": Recipe(title="ELIT-DiT", name="ELIT-DiT-S/1", model=FOUR_WINDOWS),
    "uvit": Recipe(title="ELIT-U-ViT", name="ELIT-U-ViT-S/1", model=FOUR_WINDOWS),
    "hdit": Recipe(title="ELIT-HDiT", name="ELIT-HDiT-S/1", model=FOUR_WINDOWS, budgets=(16, 12, 8, 4)),
    "mmdit": Recipe(
        title="ELIT-MM-DiT, text to image,",
        name="ELIT-MM-DiT-S/1",
        model=FOUR_WINDOWS | {"text_features": 48, "pooled_features": 48, "text_length": 24},
    ),
    # Clips need more blocks that see all frames, and more of the times at which places and class are decided.
    "video": Recipe(
        title="ELIT-DiT for video",
        name="ELIT-DiT-S/2-Video",
        model=SMALL | {"hidden_size": 64, "split": (2, 2, 2), "window": (2, 2, 3)},
        data="moving-digits",
        training={"steps": 1500, "batch_size": 16, "ema_decay": 0.995, "time_shift": 1.5, "class_dropout": 0.05},
        budgets=(12, 6, 3, 1),
        samples=100,
        scale=2.0,
    ),
}


def run(args: Args) -> Json:
    """Trains, samples, scores and writes everything into `args.out`; the README lists the files."""
    check_output(args.out)
    check_new_output(args.out, overwrite=args.overwrite, folder=True, mine=PRODUCTS.__contains__)
    start = time.perf_counter()
    points: list[Point] = []
    write_folder(args.out, lambda folder: points.extend(run_into(folder, args)))
    results = json.loads((args.out / "results.json").read_text(encoding="utf-8"))
    if not args.json:
        print_table(*table(points))
        print(f"Report: {args.out / 'report.html'}  ({time.perf_counter() - start:.0f} s)")
    return results


def run_into(out: Path, args: Args) -> list[Point]:
    """All of a quickstart, in a folder that is renamed to `args.out` in the end."""
    start, recipe, config = time.perf_counter(), args.recipe, args.training(out)
    still = digits()
    data = moving_digits() if recipe.clips else still
    cut_out = ImageSet(centred(still.images), still.labels, still.classes) if recipe.clips else still
    classifier = train_digit_classifier(cut_out, seed=args.seed)
    things = "clips of moving digits" if recipe.clips else "digits"
    _print(f"Digit classifier: {classifier.accuracy:.1%} right on {classifier.held_out} digits it never saw.")
    _print(f"Training a small multi-budget {recipe.title} for {config.steps} steps on {len(data):,} {things}.")
    model = train(config).cpu()
    _print(f"Sampling {recipe.samples} {things} at {len(recipe.budgets)} budgets, without guidance and with CCFG.")
    detector = (ClipDetector if recipe.clips else ImageDetector)(classifier.model)
    points = score(model, data, detector, recipe, args.seed)
    write_pictures(out, model, data, recipe, points, args.seed)
    write_report(out, recipe, points, classifier, config.steps, args.out)
    save_config(args.training(args.out), out / "config.yaml")
    results = {
        "backbone": args.backbone,
        "seconds": round(time.perf_counter() - start, 1),
        "classifier_accuracy": classifier.accuracy,
        "samples": recipe.samples,
        "sampling_steps": SAMPLING_STEPS,
        "rows": [
            {
                "budget": point.share,
                "tokens_per_group": int(point.budget),
                "guidance": point.guidance,
                "gflops_per_image": point.gflops,
                "ms_per_image": point.ms,
                **point.scores,
            }
            for point in points
        ],
    }
    write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    return points


def score(model: Transformer, data: ImageSet, detector: ImageDetector, recipe: Recipe, seed: int) -> list[Point]:
    """Points at every budget, without guidance and with it."""
    settings = [
        Sampling(steps=SAMPLING_STEPS, budget=budget, guidance=guidance, seed=seed)
        for budget in recipe.budgets
        for guidance in (None, recipe.guidance)
    ]
    with tempfile.TemporaryDirectory() as folder:
        work = Work(out=Path(folder), chunk=50)
        reference = measure_reference(data_pictures(data, recipe.data), detector, work)
        group = MetricGroup(recipe.data, detector, reference, ("fd", "accuracy", *(["steady"] if recipe.clips else [])))
        sampler = Sampler(model, work, conditions=class_conditions(model))
        return sweep(sampler, settings, [group], count=recipe.samples)[0]


def table(points: list[Point]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows."""
    metrics = list(points[0].scores)
    return headings(metrics), [cells(point, metrics) for point in points]


def _print(line: str) -> None:
    print(line, file=sys.stderr)


def class_conditions(model: Transformer) -> Condition:
    """y for each of the ten digits: its label, or its prompt."""
    return model.prepare_condition(CAPTIONS if model.takes_text else list(range(10)))


def write_pictures(
    out: Path, model: Transformer, data: ImageSet, recipe: Recipe, points: list[Point], seed: int
) -> None:
    """samples.png (of clips a strip of frames), samples.gif (clips alone), compute_quality.png, read_attention.png."""
    conditions, full = class_conditions(model), recipe.budgets[0]
    rows = [
        (
            f"{100 * num_latents / full:.3g}%\n{num_latents} latent{'s' if num_latents > 1 else ''}",
            sample(model, conditions, steps=SAMPLING_STEPS, budget=num_latents, guidance=recipe.guidance, seed=seed),
        )
        for num_latents in recipe.budgets
    ]
    if recipe.clips:
        sheets.animate(rows, CLASSES, out / "samples.gif")
        strips = [(label, clips[list(STRIPS)]) for label, clips in rows]
        sheets.samples_by_budget(strips, [CLASSES[digit] for digit in STRIPS], out / "samples.png")
    else:
        sheets.samples_by_budget(rows, CLASSES, out / "samples.png")
    plots.compute_quality(points, "fd", out / "compute_quality.png")

    first = torch.stack([(data.labels == label).nonzero()[0, 0] for label in range(6)])
    images, y, t = data.images[first], conditions[data.labels[first]], torch.full((len(first),), 0.7)
    x = interpolate(seeded_noise([seed] * len(first), data.shape), images, t)
    maps = read_attention(model, x, t, y)
    if recipe.clips:  # the first frame of each
        x, maps = x[:, :, 0], maps[:, :, 0]
    slots = (0, 1, 2, full - 3, full - 2, full - 1)
    sheets.read_attention(x, maps, slots, out / "read_attention.png")


def write_report(
    out: Path, recipe: Recipe, points: list[Point], classifier: TrainedClassifier, steps: int, named: Path
) -> None:
    """report.html: the pictures, the table, and a text for each; `named` is the folder's name in the end."""
    full, guided, clips = points[0].scores, points[1].scores, recipe.clips
    columns, rows = table(points)
    part = next(point for point in points if point.share <= 0.5)
    saved = 1 - part.gflops / points[0].gflops
    lead = (
        f"Trained for {steps} steps in this folder, then sampled at {len(recipe.budgets)} budgets with the same "
        f"weights. At full budget a classifier ({classifier.accuracy:.1%} right on digits it never saw) recognises "
        f"{full['accuracy']:.1%} of the {'clips' if clips else 'samples'}, {guided['accuracy']:.1%} with guidance. "
        f"{part.share:.0%} of the latents need {saved:.0%} fewer FLOPs and reach {part.scores['accuracy']:.1%}."
    )
    if clips:
        lead += f" In {guided['steady']:.1%} of the guided clips every frame shows the same digit."
    weak = f"{recipe.budgets[-1]} latent{'s' if recipe.budgets[-1] > 1 else ''}"
    condition = f"the prompt, “{CAPTIONS[7]}” for one" if "MM-DiT" in recipe.name else "the digit of the label"
    sections = [
        Section(
            title="The same noise at every budget",
            text=f"Rows are budgets, columns {condition}, with CCFG. Only the number of latents changes."
            + (" Below it three clips, their frames side by side." if clips else ""),
            image=out / ("samples.gif" if clips else "samples.png"),
        ),
        *([Section(title="Frame by frame", text="Rows are budgets.", image=out / "samples.png")] if clips else []),
        Section(
            title="Compute against quality",
            text="The Fréchet distance compares the samples with the real data on the classifier's features. CCFG "
            f"(cheap classifier-free guidance) runs its unconditional branch with {weak} per group; it makes digits "
            "easier to recognise and less varied.",
            image=out / "compute_quality.png",
        ),
        Section(
            title="The numbers",
            text=f"{recipe.samples} samples a row, {SAMPLING_STEPS} Euler steps; GFLOPs and milliseconds are for a "
            f"whole {'clip' if clips else 'image'}, all steps and guidance included. Milliseconds were measured on "
            f"this machine.{' Steady: every frame shows the same digit.' if clips else ''}",
            headings=columns,
            rows=rows,
        ),
        Section(
            title="Attention of the latents",
            text=f"Read attention at t = 0.7 for six digits{' (first frame)' if clips else ''}. Each window has its "
            "own copy of a latent; first latents are trained at every budget, last ones only near the full one.",
            image=out / "read_attention.png",
        ),
        Section(
            title="Next steps",
            text="Sample with this model from the command line, train it longer with its own settings, or try a larger "
            "one on real pictures of clothes, which comes trained with the package:",
            code="\n".join(next_commands(named, recipe)),
        ),
    ]
    title = f"One model, many budgets: {recipe.title} on handwritten digits"
    write_page(out / "report.html", title, lead, sections)


def next_commands(out: Path, recipe: Recipe) -> list[str]:
    prompt = f' --prompts "{CAPTIONS[3]}" "{CAPTIONS[7]}"' if "MM-DiT" in recipe.name else ""
    guidance = f"--guidance ccfg --guidance-budget {recipe.budgets[-1]} --scale 2"
    file = "clips.gif" if recipe.clips else "digits.png"
    return [
        f"elit sample {out / 'model'}{prompt} --budget 50% {guidance} --out {file}",
        f"elit train --config {out / 'config.yaml'} --steps 5000 --out runs/longer",
        "elit sample fashion --labels sneaker bag --count 12 --budget 25% --guidance ccfg --scale 2 --out clothes.png",
    ]
