"""From nothing to a report in about two minutes: train an ELIT-DiT on digits, turn its dial, score what comes out."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from elit.config import ModelConfig, TrainConfig, write_text
from elit.data.digits import digits
from elit.data.images import ImageSet
from elit.evaluate.attention import read_attention
from elit.evaluate.features import TrainedClassifier, train_digit_classifier
from elit.evaluate.run import Score, score_dial
from elit.flow.guidance import CCFG
from elit.flow.path import interpolate
from elit.models.dit import DiT
from elit.report import plots
from elit.report.html import Section, write_page
from elit.report.tables import HEADINGS, score_cells
from elit.sampling import sample, seeded_noise
from elit.train import train

BUDGETS = (16, 8, 4, 2, 1)
GUIDANCE = CCFG(1.5, 1)
SAMPLING_STEPS = 16
SAMPLES = 200
# What a run leaves in its folder; only this is cleared for a new one.
PRODUCTS = (
    *("model", "checkpoints", "samples", "logs", "config.yaml", "metrics.jsonl", "results.json"),
    *("samples.png", "compute_quality.png", "read_attention.png", "report.html"),
)


@dataclass(frozen=True)
class Quickstart:
    """What a quickstart came to."""

    seconds: float
    scores: list[Score]
    classifier: TrainedClassifier
    report: Path

    def results(self) -> dict[str, Any]:
        """The content of results.json."""
        return {
            "seconds": round(self.seconds, 1),
            "classifier_accuracy": self.classifier.accuracy,
            "samples": SAMPLES,
            "sampling_steps": SAMPLING_STEPS,
            "rows": [asdict(score) for score in self.scores],
        }


def run_config(out: Path, steps: int, seed: int) -> TrainConfig:
    """One window of 4×4 tokens for each quarter of a digit, 1 to 16 latents in it."""
    return TrainConfig(
        out=str(out),
        model=ModelConfig(
            name="ELIT-DiT-S/1", hidden_size=48, num_heads=2, depth=6, split=(1, 4, 1), window=(4, 4), num_latents=16
        ),
        data="digits",
        steps=steps,
        batch_size=32,
        learning_rate=4e-3,
        warmup_steps=50,
        ema_decay=0.99,
        checkpoint_every=steps,
        preview_every=0,
        seed=seed,
    )


def quickstart(out: str | Path, *, steps: int = 700, seed: int = 0, say: Callable[[str], None] = print) -> Quickstart:
    """Trains, samples, scores and writes everything into `out`; see the README for what is there afterwards."""
    start, out = time.perf_counter(), Path(out)
    config = run_config(out, steps, seed)
    clear(out)
    data = digits()
    classifier = train_digit_classifier(data, seed=seed)
    say(f"Digit classifier: {classifier.accuracy:.1%} right on {classifier.held_out} digits it never saw.")
    say(f"Training a small multi-budget ELIT-DiT for {steps} steps on {len(data):,} digits.")
    model = train(config).cpu()
    say(f"Sampling {SAMPLES} digits at {len(BUDGETS)} budgets, without guidance and with CCFG.")
    scores = score_dial(
        model,
        classifier.model,
        data.images,
        budgets=BUDGETS,
        guidance=(None, GUIDANCE),
        count=SAMPLES,
        steps=SAMPLING_STEPS,
        seed=seed,
        progress=lambda done, total: say(f"sampled batch {done} of {total} at every setting"),
    )
    draw_pictures(out, model, data, scores, seed)
    write_report(out, scores, classifier, steps)
    result = Quickstart(time.perf_counter() - start, scores, classifier, out / "report.html")
    write_text(out / "results.json", json.dumps(result.results(), indent=2) + "\n")
    return result


def clear(out: Path) -> None:
    """Removes an earlier quickstart from its folder, and nothing else."""
    for name in PRODUCTS:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def draw_pictures(out: Path, model: DiT, data: ImageSet, scores: list[Score], seed: int) -> None:
    """samples.png, compute_quality.png and read_attention.png."""
    labels = list(range(10))
    rows = [
        (
            f"{100 * kept / BUDGETS[0]:g}%\n{kept} latent{'s' if kept > 1 else ''}",
            sample(model, labels, steps=SAMPLING_STEPS, budget=kept, guidance=GUIDANCE, seed=seed),
        )
        for kept in BUDGETS
    ]
    plots.samples_by_budget(rows, [str(label) for label in labels], out / "samples.png")
    plots.compute_quality(scores, out / "compute_quality.png")

    first = torch.stack([(data.labels == label).nonzero()[0, 0] for label in range(6)])
    images, y, t = data.images[first], data.labels[first], torch.full((len(first),), 0.7)
    x = interpolate(seeded_noise([seed] * len(first), data.shape), images, t)
    maps = read_attention(model, x, t, y)
    plots.read_attention(x, maps, (0, 1, 2, 13, 14, 15), out / "read_attention.png")


def write_report(out: Path, scores: list[Score], classifier: TrainedClassifier, steps: int) -> None:
    """report.html: the pictures, the table, and what to read in them."""
    full, full_guided = scores[0], scores[1]
    half = next(score for score in scores if score.tokens_per_group == BUDGETS[1])
    saved = 1 - half.gflops_per_image / full.gflops_per_image
    write_page(
        out / "report.html",
        "One model, many budgets: ELIT-DiT on handwritten digits",
        f"Trained for {steps} steps in this folder, then sampled at {len(BUDGETS)} budgets with the same weights. "
        f"At full budget a classifier ({classifier.accuracy:.1%} right on digits it never saw) recognises "
        f"{full.accuracy:.1%} of the samples, {full_guided.accuracy:.1%} with guidance. Half of the latents need "
        f"{saved:.0%} fewer FLOPs and reach {half.accuracy:.1%}.",
        [
            Section(
                title="The same noise at every budget",
                text="Rows are budgets, columns the digit asked for, with CCFG. Only the number of latents changes.",
                image=out / "samples.png",
                alt="Generated digits, one row a budget",
            ),
            Section(
                title="Compute against quality",
                text="The Fréchet distance compares the samples with the real digits on the classifier's features. "
                "CCFG (cheap classifier-free guidance) runs its unconditional branch with one latent per group; it "
                "makes digits easier to recognise and less varied.",
                image=out / "compute_quality.png",
                alt="Fréchet distance and class accuracy against GFLOPs and milliseconds",
            ),
            Section(
                title="The numbers",
                text=f"{SAMPLES} samples a row, {SAMPLING_STEPS} Euler steps; GFLOPs and milliseconds are for a whole "
                "image, all steps and guidance included. Milliseconds were measured on this machine.",
                headings=HEADINGS,
                rows=[score_cells(score) for score in scores],
            ),
            Section(
                title="What the latents read",
                text="Read attention at t = 0.7 for six digits. Each of the four windows has its own copy of a latent; "
                "first latents are trained at every budget, last ones only near the full one.",
                image=out / "read_attention.png",
                alt="Attention of single latents over noisy digits",
            ),
            Section(
                title="Go on from here",
                text="Sample with this model from the command line, or train it longer with its own settings:",
                code=f"elit sample {out / 'model'} --budget 0.5 --guidance ccfg --scale 2 --out digits.png\n"
                f"elit train --config {out / 'config.yaml'} --steps 5000 --out runs/longer",
            ),
        ],
    )
