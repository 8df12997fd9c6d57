"""Arms of a study: networks trained from the same seeds on the same digits, for the same FLOPs.

Arms of one seed and one batch size see the same images, noise and times. Every arm gets the training FLOPs of the
reference arm: same steps, a batch as much larger as its forward is cheaper (which is how the paper gives its
multi-budget models a batch of 384 for the baseline's 256).
"""

import argparse
import hashlib
import json
import statistics
import time
from dataclasses import asdict, replace
from functools import cache
from typing import Any
from unittest.mock import patch

import torch

import elit
from elit.budgets import training_budgets
from elit.config import ModelConfig, TrainConfig
from elit.costs.flops import count_flops
from elit.data.builtin import digits
from elit.data.images import ImageSet
from elit.models.dit import DiT
from elit.models.presets import model_config
from elit.training import train as training

SIZES: dict[str, Any] = {"hidden_size": 48, "num_heads": 2, "depth": 6}
TRAINING: dict[str, Any] = {"learning_rate": 4e-3, "warmup_steps": 50, "ema_decay": 0.99, "preview_every": 0}
# The reference arm of most studies: 64 tokens of a pixel each, 4 windows of 4×4, two thirds of the blocks in the core.
WINDOW, SPLIT, LATENTS = (4, 4), (1, 4, 1), 16
FULL = ModelConfig(name="ELIT-DiT-S/1", window=WINDOW, split=SPLIT, **SIZES)
HELD_OUT = 297


@cache
def data() -> tuple[ImageSet, ImageSet]:
    """The digits to train on, and those kept for the loss."""
    every = digits()
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    parts = order[HELD_OUT:], order[:HELD_OUT]
    training, held_out = (ImageSet(every.images[part], every.labels[part], every.classes) for part in parts)
    return training, held_out


def train_or_load(args: argparse.Namespace, config: TrainConfig, network: type[DiT] = DiT) -> DiT:
    """The network that `config` trains on the digits, from the cache if it is there; `network` may be a subclass."""
    settings = {key: value for key, value in asdict(config).items() if key != "out"}
    versions = [elit.__version__, torch.__version__]
    words = json.dumps([network.__name__, settings, versions, args.device], sort_keys=True)
    folder = args.cache / hashlib.sha256(words.encode()).hexdigest()[:12]
    if not (folder / "model").is_dir():
        start = time.perf_counter()
        make = patch.object(training, "create_model", lambda name, **kw: network(**model_config(name, **kw)[1]))
        load = patch.object(training, "load_data", lambda _: data()[0])
        every = config.steps
        run = replace(config, out=str(folder), log_every=every, checkpoint_every=every, resume=True)
        with make, load:
            training.train(run)
        seconds = time.perf_counter() - start
        print(f"trained {network.__name__} {config.model.arguments()}, seed {config.seed}: {seconds:.0f} s", flush=True)
    return network.from_pretrained(folder / "model").eval().to(args.device)


def run_config(args: argparse.Namespace, seed: int, model: ModelConfig, **training: Any) -> TrainConfig:
    """A run of `model` for args.steps steps."""
    settings: dict[str, Any] = {"batch_size": args.batch_size, "steps": args.steps, "seed": seed}
    return TrainConfig(model=model, data="digits", **(TRAINING | settings | training))


def matched(args: argparse.Namespace, seed: int, model: ModelConfig, **training: Any) -> TrainConfig:
    """`run_config` with the batch at which a step costs what a step of FULL at all its latents costs."""
    config = run_config(args, seed, model, **training)
    reference = image_flops(run_config(args, seed, FULL, budget_min=LATENTS)) * args.batch_size
    return replace(config, batch_size=round(reference / image_flops(config)))


def image_flops(config: TrainConfig) -> float:
    """Training FLOPs of one image: 3 forwards, in the mean over the budgets drawn (PAPER section 5)."""
    network = DiT(**model_config(**config.model.arguments(), sample_size=8, in_channels=1, num_classes=10)[1])
    budgets = training_budgets(network.budgets, config.budget_min, config.budget_max) or (None,)
    return 3 * statistics.mean(count_flops(network, budget=budget) for budget in budgets)


def training_tflops(config: TrainConfig) -> float:
    return image_flops(config) * config.batch_size * config.steps / 1e12
