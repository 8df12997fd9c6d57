"""What the studies share: the data, training or loading a network, scoring it, the rule of verdicts, the result files.

A study trains its arms from the same seeds and compares them seed by seed: arms of one seed and one batch size see the
same images, noise and times. Every arm gets the training FLOPs of the reference arm: same steps, a batch as much larger
as its forward is cheaper (which is how the paper gives its multi-budget models a batch of 384 for the baseline's 256).
"""

import argparse
import hashlib
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor

import elit
import elit.train
from elit.budgets import Schedule, training_budgets
from elit.config import ModelConfig, TrainConfig, write_text
from elit.data.digits import digits
from elit.data.images import ImageSet
from elit.evaluate.features import ImageDetector, train_digit_classifier
from elit.evaluate.metrics import frechet_distance
from elit.evaluate.statistics import Moments
from elit.flops import count_flops
from elit.flow.guidance import Guidance
from elit.flow.path import flow_matching_loss, interpolate, logit_normal
from elit.models.dit import DiT
from elit.models.presets import model_config
from elit.sampling import sample, sampling_flops, seeded_noise

ROOT = Path(__file__).parents[1]
SIZES: dict[str, Any] = {"hidden_size": 48, "num_heads": 2, "depth": 6}
TRAINING: dict[str, Any] = {"learning_rate": 4e-3, "warmup_steps": 50, "ema_decay": 0.99, "preview_every": 0}
# The reference arm of most studies: 64 tokens of a pixel each, 4 windows of 4×4, two thirds of the blocks in the core.
WINDOW, SPLIT, LATENTS = (4, 4), (1, 4, 1), 16
FULL = ModelConfig(name="ELIT-DiT-S/1", window=WINDOW, split=SPLIT, **SIZES)
HELD_OUT = 297
Values = Mapping[tuple[str, str], Mapping[int, float]]
"""(arm, metric) -> seed -> value."""


# ---- the command line


def arguments(line: Sequence[str] | None, about: str | None, script: str) -> argparse.Namespace:
    """The options all studies take. Sets up torch: one thread, so that studies side by side do not fight."""
    name = Path(script).stem.split("_")[0]
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="training seeds 0, 1, …")
    parser.add_argument("--steps", type=int, default=400, help="training steps of every arm")
    parser.add_argument("--batch-size", type=int, default=32, help="of the reference arm")
    parser.add_argument("--samples", type=int, default=500, help="samples behind every Fréchet distance")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "studies" / "results" / f"{name}.json")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "studies", help="where trained networks are kept")
    args = parser.parse_args(line)
    args.command = shlex.join(["python", f"studies/{Path(script).name}", *(sys.argv[1:] if line is None else line)])
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # training takes a GPU wherever it sees one
    torch.set_num_threads(1)
    return args


# ---- data


@cache
def data() -> tuple[ImageSet, ImageSet]:
    """The digits to train on, and those kept for the loss."""
    every = digits()
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    parts = order[HELD_OUT:], order[:HELD_OUT]
    training, held_out = (ImageSet(every.images[part], every.labels[part], every.classes) for part in parts)
    return training, held_out


@cache
def detector() -> ImageDetector:
    """The digit classifier, the same in all studies."""
    return ImageDetector(train_digit_classifier(digits(), seed=0).model)


# ---- training


def train_or_load(args: argparse.Namespace, config: TrainConfig, network: type[DiT] = DiT) -> DiT:
    """The network that `config` trains on the digits, from the cache if it is there; `network` may be a subclass."""
    settings = {key: value for key, value in asdict(config).items() if key != "out"}
    versions = [elit.__version__, torch.__version__]
    words = json.dumps([network.__name__, settings, versions, args.device], sort_keys=True)
    folder = args.cache / hashlib.sha256(words.encode()).hexdigest()[:12]
    if not (folder / "model").is_dir():
        start = time.perf_counter()
        make = patch.object(elit.train, "create_model", lambda name, **kw: network(**model_config(name, **kw)[1]))
        load = patch.object(elit.train, "load_data", lambda _: data()[0])
        every = config.steps
        run = replace(config, out=str(folder), log_every=every, checkpoint_every=every, resume=True)
        with make, load:
            elit.train.train(run)
        seconds = time.perf_counter() - start
        print(f"trained {network.__name__} {config.model.chosen()}, seed {config.seed}: {seconds:.0f} s", flush=True)
    return network.from_pretrained(folder / "model").eval().to(args.device)


def run_config(args: argparse.Namespace, seed: int, model: ModelConfig, **training: Any) -> TrainConfig:
    """A run of `model` for args.steps steps."""
    settings = {"batch_size": args.batch_size, "steps": args.steps, "seed": seed}
    return TrainConfig(model=model, data="digits", **(TRAINING | settings | training))


def matched(args: argparse.Namespace, seed: int, model: ModelConfig, **training: Any) -> TrainConfig:
    """`run_config` with the batch at which a step costs what a step of FULL at all its latents costs."""
    config = run_config(args, seed, model, **training)
    reference = image_flops(run_config(args, seed, FULL, budget_min=LATENTS)) * args.batch_size
    return replace(config, batch_size=round(reference / image_flops(config)))


def image_flops(config: TrainConfig) -> float:
    """Training FLOPs of one image: 3 forwards, in the mean over the budgets drawn (PAPER section 5)."""
    network = DiT(**model_config(**config.model.chosen(), sample_size=8, in_channels=1, num_classes=10)[1])
    budgets = training_budgets(network.budgets, config.budget_min, config.budget_max) or (None,)
    return 3 * statistics.mean(count_flops(network, budget=budget) for budget in budgets)


def training_tflops(config: TrainConfig) -> float:
    return image_flops(config) * config.batch_size * config.steps / 1e12


# ---- scoring


@torch.no_grad()
def held_out_loss(args: argparse.Namespace, model: DiT, budget: int | None = None, draws: int = 4) -> float:
    """Flow-matching loss on the digits not trained on, `draws` noises and times an image, the same for all networks.

    Times are evenly spread quantiles of the logit-normal, in random order: less noise than independent ones.
    """
    images, labels = data()[1].images[: args.samples], data()[1].labels[: args.samples]
    count, total = draws * len(images), 0.0
    quantiles = (torch.randperm(count, generator=torch.Generator().manual_seed(1)) + 0.5) / count
    times = logit_normal(torch.special.ndtri(quantiles)).split(len(images))
    for draw, t in enumerate(times):
        noise = seeded_noise(range(10**6 * (draw + 1), 10**6 * (draw + 1) + len(images)), images.shape[1:])
        x = interpolate(noise, images, t).to(model.device)
        velocity = model(x, t.to(model.device), labels.to(model.device), budget).cpu()
        total += flow_matching_loss(velocity, noise, images).mean().item() / draws
    return total


def draw(
    model: DiT, count: int, *, steps: int, budget: Schedule = None, guidance: Guidance | None = None
) -> tuple[Tensor, Tensor]:
    """`count` digits, classes in turn, as they leave the solver, and their labels; the same noise for all networks."""
    labels = torch.arange(count) % 10
    settings = {"steps": steps, "budget": budget, "guidance": guidance}
    settings |= {"sample_size": 8, "seed": 5000, "batch_size": 250}
    return sample(model, labels, **settings).cpu(), labels  # type: ignore[arg-type]


def score(images: Tensor, labels: Tensor) -> dict[str, float]:
    """Fréchet distance ("FD") to all real digits on the classifier's features, and "accuracy"."""
    find = detector()
    real = Moments(find.width).add(find(digits().images).features)
    found = find(images.clamp(-1, 1))
    drawn = Moments(find.width).add(found.features)
    distance = frechet_distance(real.mean, real.covariance, drawn.mean, drawn.covariance)
    return {"FD": distance, "accuracy": torch.eq(cast(Tensor, found.label), labels).float().mean().item()}


def sampling_gflops(model: DiT, **settings: Any) -> float:
    """Of one whole sample."""
    return sampling_flops(model, **settings) / 1e9


# ---- the verdict


def verdict(advantages: Sequence[float]) -> str:
    """The rule, fixed before any run. advantages: one number a seed, positive where the claim is right.

    Holds: every seed positive and the mean more than 2 standard errors above 0; does not hold: the same below 0.
    Less than 3 seeds decide nothing.
    """
    if len(advantages) < 3:
        return "undecided"
    mean, error = statistics.mean(advantages), standard_error(advantages)
    if min(advantages) > 0 and mean > 2 * error:
        return "holds"
    if max(advantages) < 0 and mean < -2 * error:
        return "does not hold"
    return "undecided"


def standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def overall(verdicts: Sequence[str]) -> str:
    """A claim holds if all its parts do, and does not if one does not."""
    return next((found for found in ("does not hold", "undecided") if found in verdicts), "holds")


# ---- the result file


class Record:
    """What a study measured, written after every seed, so that an early stop leaves a valid file."""

    def __init__(self, args: argparse.Namespace, claim: int, notes: str):
        self.args, self.claim, self.notes = args, claim, notes
        self.values: dict[tuple[str, str], dict[int, float]] = {}
        self.arms: dict[str, dict[str, Any]] = {}
        self.parts: list[tuple[str, str, Callable[[Values, int], float]]] = []
        self.start = time.perf_counter()

    def arm(self, name: str, config: TrainConfig, tflops: float | None = None) -> None:
        """Notes what an arm trained on."""
        model = {key: value for key, value in config.model.chosen().items() if key not in SIZES}
        cost = training_tflops(config) if tflops is None else tflops
        self.arms[name] = {**model, "batch_size": config.batch_size, "training_tflops": round(cost, 3)}

    def add(self, arm: str, seed: int, **metrics: float) -> None:
        for metric, value in metrics.items():
            self.values.setdefault((arm, metric), {})[seed] = value

    def part(self, says: str, unit: str, advantage: Callable[[Values, int], float]) -> None:
        """A testable part of the claim: advantage(values, seed) is positive where it is right."""
        self.parts.append((says, unit, advantage))

    def save(self, done: Sequence[int]) -> None:
        """Writes the file with all seeds of `done`."""
        rows = [
            {"arm": arm, "metric": metric, "values": [found[seed] for seed in done], **spread([found[s] for s in done])}
            for (arm, metric), found in self.values.items()
        ]
        parts: list[dict[str, Any]] = []
        for says, unit, advantage in self.parts:
            advantages = [advantage(self.values, seed) for seed in done]
            found = {"advantages": advantages, "mean": statistics.mean(advantages)}
            error = standard_error(advantages) if len(done) > 1 else None
            parts.append({"says": says, "unit": unit, **found, "standard_error": error, "verdict": verdict(advantages)})
        content = {
            "claim": self.claim,
            "command": self.args.command,
            "notes": self.notes,
            "verdict": overall([part["verdict"] for part in parts]),
            "seeds": list(done),
            "asked_seeds": self.args.seeds,
            "settings": {"steps": self.args.steps, "batch_size": self.args.batch_size, "samples": self.args.samples},
            "versions": {"elit": elit.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "hardware": f"{processor()}, one thread" if self.args.device == "cpu" else self.args.device,
            "seconds": round(time.perf_counter() - self.start),
            "arms": self.arms,
            "parts": parts,
            "rows": rows,
        }
        write_text(self.args.out, as_text(content))
        print(f"claim {self.claim}, seeds {list(done)}: {content['verdict']}", flush=True)
        for part in parts:
            print(f"  {part['verdict']:13}  {part['mean']:+.4g}  {part['says']}", flush=True)


def as_text(content: dict[str, Any]) -> str:
    """JSON with a row a line and six digits, so that a change shows in a diff."""

    def plain(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items()}
        return [plain(part) for part in value] if isinstance(value, list | tuple) else value

    fields = []
    for key, value in content.items():
        rows = isinstance(value, list) and value and isinstance(value[0], dict)
        text = (
            ",\n".join(f"  {json.dumps(plain(row), ensure_ascii=False)}" for row in value)
            if rows
            else json.dumps(plain(value), ensure_ascii=False)
        )
        fields.append(f' "{key}": ' + (f"[\n{text}\n ]" if rows else text))
    return "{\n" + ",\n".join(fields) + "\n}\n"


def spread(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
