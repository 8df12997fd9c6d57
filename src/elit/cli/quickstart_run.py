"""From nothing to a report in a few minutes: train a small ELIT network, turn its dial, score what comes out."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from elit.config import ModelConfig, TrainConfig, save_config
from elit.data.digits import CAPTIONS, CLASSES, digits, moving_digits
from elit.data.images import ImageSet
from elit.evaluate import plots
from elit.evaluate.features import ClipDetector, ImageDetector, TrainedClassifier, centred, train_digit_classifier
from elit.evaluate.inspect.attention import read_attention
from elit.evaluate.report.html import Section, write_page
from elit.evaluate.report.tables import headings, score_cells
from elit.evaluate.run import Score, score_dial
from elit.files import check_new_output, write_folder, write_text
from elit.flow.guidance import CCFG, Guidance
from elit.flow.path import interpolate
from elit.models.conditioning import Condition
from elit.models.transformer import Transformer
from elit.sampling.sample import sample, seeded_noise
from elit.training.train import train

SAMPLING_STEPS = 16
STRIPS = (2, 5, 7)  # the digits whose clips are shown frame by frame
# What a run leaves in its folder; a folder that holds anything else is not replaced.
PRODUCTS = (
    *("model", "checkpoints", "samples", "logs", "config.yaml", "metrics.jsonl", "results.json"),
    *("samples.png", "samples.gif", "compute_quality.png", "read_attention.png", "report.html"),
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a quickstart trains, and at which budgets it looks."""

    title: str
    name: str
    """The preset whose kind of network it is."""
    model: dict[str, Any]
    """Its sizes."""
    data: str = "digits"
    training: dict[str, Any] = field(default_factory=dict)
    """Where its training differs from `TRAINING`."""
    budgets: tuple[int, ...] = (16, 8, 4, 2, 1)
    samples: int = 200
    """How many are scored at each setting."""
    scale: float = 1.5
    """Of guidance."""

    @property
    def guidance(self) -> Guidance:
        """CCFG with the least budget in the unconditional branch."""
        return CCFG(self.scale, self.budgets[-1])


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


@dataclass(frozen=True)
class Quickstart:
    """What a quickstart came to."""

    backbone: str
    seconds: float
    scores: list[Score]
    classifier: TrainedClassifier
    report: Path

    def results(self) -> dict[str, Any]:
        """The content of results.json."""
        return {
            "backbone": self.backbone,
            "seconds": round(self.seconds, 1),
            "classifier_accuracy": self.classifier.accuracy,
            "samples": RECIPES[self.backbone].samples,
            "sampling_steps": SAMPLING_STEPS,
            "rows": [{k: v for k, v in asdict(score).items() if v is not None} for score in self.scores],
        }


def run_config(recipe: Recipe, out: Path, steps: int | None, seed: int) -> TrainConfig:
    settings: dict[str, Any] = TRAINING | recipe.training | ({} if steps is None else {"steps": steps})
    model = ModelConfig(name=recipe.name, **recipe.model)
    config = TrainConfig(out=str(out), model=model, data=recipe.data, preview_every=0, seed=seed, **settings)
    return replace(config, checkpoint_every=config.steps)


def quickstart(
    out: str | Path,
    *,
    overwrite: bool = False,
    backbone: str = "dit",
    steps: int | None = None,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Quickstart:
    """Trains, samples, scores and writes everything into `out`; see the README for what is there afterwards.

    overwrite: replace an earlier quickstart in `out`, once this one is done. backbone: one of RECIPES. steps: of
    training, default the recipe's. Raises ValueError where `out` is there already, or holds anything else.
    """
    out = Path(out)
    if backbone not in RECIPES:
        raise ValueError(f"backbone={backbone!r}: give one of {', '.join(RECIPES)}")
    config = run_config(RECIPES[backbone], out, steps, seed)
    check_new_output(out, overwrite=overwrite, folder=True, mine=PRODUCTS.__contains__)
    results: list[Quickstart] = []
    write_folder(out, lambda folder: results.append(run_into(folder, config, backbone, seed, say)))
    return replace(results[0], report=out / "report.html")


def run_into(folder: Path, config: TrainConfig, backbone: str, seed: int, say: Callable[[str], None]) -> Quickstart:
    """All of a quickstart, in a folder that gets its name `config.out` in the end."""
    start, out = time.perf_counter(), folder
    recipe, named = RECIPES[backbone], Path(config.out)
    config = replace(config, out=str(folder))
    still = digits()
    clips = recipe.data == "moving-digits"
    data = moving_digits() if clips else still
    seen = ImageSet(centred(still.images), still.labels, still.classes) if clips else still
    classifier = train_digit_classifier(seen, seed=seed)
    say(f"Digit classifier: {classifier.accuracy:.1%} right on {classifier.held_out} digits it never saw.")
    say(f"Training a small multi-budget {recipe.title} for {config.steps} steps on {len(data):,} {noun(clips)}.")
    model = train(config).cpu()
    conditions = class_conditions(model)
    say(f"Sampling {recipe.samples} {noun(clips)} at {len(recipe.budgets)} budgets, without guidance and with CCFG.")
    scores = score_dial(
        model,
        ClipDetector(classifier.model) if clips else ImageDetector(classifier.model),
        data.images,
        conditions=conditions,
        budgets=recipe.budgets,
        guidance=(None, recipe.guidance),
        count=recipe.samples,
        steps=SAMPLING_STEPS,
        seed=seed,
        progress=lambda done, total: say(f"sampled batch {done} of {total} at every setting"),
    )
    draw_pictures(out, model, data, recipe, scores, seed)
    write_report(out, recipe, scores, classifier, config.steps, named)
    save_config(replace(config, out=str(named)), out / "config.yaml")
    result = Quickstart(backbone, time.perf_counter() - start, scores, classifier, out / "report.html")
    write_text(out / "results.json", json.dumps(result.results(), indent=2) + "\n")
    return result


def class_conditions(model: Transformer) -> Condition:
    """y for each of the ten digits: its label, or its prompt."""
    return model.prepare_condition(CAPTIONS if model.takes_text else list(range(10)))


def noun(clips: bool) -> str:
    return "clips of moving digits" if clips else "digits"


def draw_pictures(
    out: Path, model: Transformer, data: ImageSet, recipe: Recipe, scores: list[Score], seed: int
) -> None:
    """samples.png (of clips a strip of frames), samples.gif (clips alone), compute_quality.png, read_attention.png."""
    conditions, most = class_conditions(model), recipe.budgets[0]
    rows = [
        (
            f"{100 * num_latents / most:.3g}%\n{num_latents} latent{'s' if num_latents > 1 else ''}",
            sample(model, conditions, steps=SAMPLING_STEPS, budget=num_latents, guidance=recipe.guidance, seed=seed),
        )
        for num_latents in recipe.budgets
    ]
    if data.images.ndim == 5:
        plots.animate(rows, CLASSES, out / "samples.gif")
        strips = [(label, clips[list(STRIPS)]) for label, clips in rows]
        plots.samples_by_budget(strips, [CLASSES[digit] for digit in STRIPS], out / "samples.png")
    else:
        plots.samples_by_budget(rows, CLASSES, out / "samples.png")
    plots.compute_quality(scores, out / "compute_quality.png")

    first = torch.stack([(data.labels == label).nonzero()[0, 0] for label in range(6)])
    images, y, t = data.images[first], conditions[data.labels[first]], torch.full((len(first),), 0.7)
    x = interpolate(seeded_noise([seed] * len(first), data.shape), images, t)
    maps = read_attention(model, x, t, y)
    slots = (0, 1, 2, most - 3, most - 2, most - 1)
    if x.ndim == 5:  # the first frame of each clip
        x, maps = x[:, :, 0], maps[:, :, 0]
    plots.read_attention(x, maps, slots, out / "read_attention.png")


def write_report(
    out: Path, recipe: Recipe, scores: list[Score], classifier: TrainedClassifier, steps: int, named: Path
) -> None:
    """report.html: the pictures, the table, and what to read in them; `named` is where they will be in the end."""
    full, full_guided = scores[0], scores[1]
    part = next(score for score in scores if score.tokens_per_group <= recipe.budgets[0] / 2)
    saved = 1 - part.gflops_per_image / full.gflops_per_image
    clips = full.steady is not None
    lead = (
        f"Trained for {steps} steps in this folder, then sampled at {len(recipe.budgets)} budgets with the same "
        f"weights. At full budget a classifier ({classifier.accuracy:.1%} right on digits it never saw) recognises "
        f"{full.accuracy:.1%} of the {'clips' if clips else 'samples'}, {full_guided.accuracy:.1%} with guidance. "
        f"{part.budget:.0%} of the latents need {saved:.0%} fewer FLOPs and reach {part.accuracy:.1%}."
    )
    if clips:
        lead += f" In {full_guided.steady:.1%} of the guided clips every frame shows the same digit."
    thing = "clip" if clips else "image"
    weak = recipe.budgets[-1]
    write_page(
        out / "report.html",
        f"One model, many budgets: {recipe.title} on handwritten digits",
        lead,
        [
            *picture_sections(out, recipe, clips),
            Section(
                title="Compute against quality",
                text="The Fréchet distance compares the samples with the real data on the classifier's features. CCFG "
                f"(cheap classifier-free guidance) runs its unconditional branch with {weak} "
                f"latent{'s' if weak > 1 else ''} per group; it makes digits easier to recognise and less varied.",
                image=out / "compute_quality.png",
                alt="Fréchet distance and class accuracy against GFLOPs and milliseconds",
            ),
            Section(
                title="The numbers",
                text=f"{recipe.samples} samples a row, {SAMPLING_STEPS} Euler steps; GFLOPs and milliseconds are for a "
                f"whole {thing}, all steps and guidance included. Milliseconds were measured on this machine."
                + (" Steady: every frame shows the same digit." if clips else ""),
                headings=headings(scores),
                rows=[score_cells(score) for score in scores],
            ),
            Section(
                title="What the latents read",
                text=f"Read attention at t = 0.7 for six digits{' (first frame)' if clips else ''}. Each window has "
                "its own copy of a latent; first latents are trained at every budget, last ones only near the full.",
                image=out / "read_attention.png",
                alt="Attention of single latents over noisy digits",
            ),
            Section(
                title="Go on from here",
                text="Sample with this model from the command line, train it longer with its own settings, or look at "
                "a larger one on real pictures of clothes, which comes trained with the package:",
                code="\n".join(next_commands(named, recipe)),
            ),
        ],
    )


def picture_sections(out: Path, recipe: Recipe, clips: bool) -> list[Section]:
    """The samples: images as they are, clips moving and frame by frame."""
    asked = f"the prompt, “{CAPTIONS[7]}” for one" if "MM-DiT" in recipe.name else "the digit asked for"
    title = "The same noise at every budget"
    text = f"Rows are budgets, columns {asked}, with CCFG. Only the number of latents changes."
    if not clips:
        return [Section(title=title, text=text, image=out / "samples.png", alt="Generated digits, one row a budget")]
    frames = "Three of them, their frames side by side."
    return [
        Section(title=title, text=text, image=out / "samples.gif", alt="Generated clips, one row a budget"),
        Section(title="Frame by frame", text=frames, image=out / "samples.png", alt="Frames of generated clips"),
    ]


def next_commands(out: Path, recipe: Recipe) -> list[str]:
    """What to type next."""
    end = "clips.gif" if recipe.data == "moving-digits" else "digits.png"
    prompt = f' --prompts "{CAPTIONS[3]}" "{CAPTIONS[7]}"' if "MM-DiT" in recipe.name else ""
    guidance = f"--guidance ccfg --guidance-budget {recipe.budgets[-1]} --scale 2"
    return [
        f"elit sample {out / 'model'}{prompt} --budget 50% {guidance} --out {end}",
        f"elit train --config {out / 'config.yaml'} --steps 5000 --out runs/longer",
        "elit sample fashion --labels sneaker bag --count 12 --budget 25% --guidance ccfg --scale 2 --out clothes.png",
    ]
