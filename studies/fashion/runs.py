"""Arms of the Fashion-MNIST studies: networks trained for the same FLOPs, with checkpoints along the way.

32×32 pixels in patches of 4: 8×8 tokens, 4 windows of 4×4, 16 latents a window. A step of every arm costs what a step
of the reference arm (ELIT, all latents, batch 64) costs: a cheaper network gets a larger batch, as the paper gives its
multi-budget networks 384 for the baseline's 256.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from elit.budgets import training_budgets
from elit.config import ModelConfig, TrainConfig
from elit.costs.flops import count_flops
from elit.elastic.load import load_model
from elit.models.dit import DiT
from elit.models.presets import NETWORKS, model_config
from elit.models.saved import checkpoint_step, checkpoints
from elit.training import train as training

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "studies"))
from random_drop import RandomDropDiT  # noqa: E402

LATENTS = 16
MILESTONE = 1180
STEPS = 4 * MILESTONE
"""302,080 pictures of the reference arm; its checkpoints are of 75,520 pictures, 151,040, …"""
BATCH_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A network and the budgets it is trained at."""

    elit: bool = True
    budgets: tuple[int, int] = (1, LATENTS)
    """Fewest and most latents a window drawn in training."""
    split: tuple[int, int, int] = (1, 4, 1)
    """Blocks of head, core and tail."""
    random_drop: bool = False
    """Keep a random set of the latents in training, not the first ones."""

    @property
    def model(self) -> ModelConfig:
        sizes = ModelConfig(name="DiT-S/4", hidden_size=128, depth=6, num_heads=2)
        if not self.elit:
            return sizes
        return replace(sizes, name="ELIT-DiT-S/4", split=self.split, window=(4, 4), num_latents=LATENTS)


ARMS = {
    "DiT": Arm(elit=False),
    "ELIT": Arm(budgets=(LATENTS, LATENTS)),
    "ELIT multi-budget": Arm(),
    "ELIT 25%": Arm(budgets=(4, 4)),
    "random drop": Arm(random_drop=True),
    "ELIT 0-6-0": Arm(budgets=(LATENTS, LATENTS), split=(0, 6, 0)),
    "ELIT 2-2-2": Arm(budgets=(LATENTS, LATENTS), split=(2, 2, 2)),
}


def run_config(arm: str, seed: int, *, out: Path, steps: int = STEPS, batch_size: int = BATCH_SIZE) -> TrainConfig:
    """The training run of an arm, in OUT/ARM-SEED; batch_size: of the reference arm."""
    each = picture_flops(arm)
    budgets = ARMS[arm].budgets if ARMS[arm].elit else (None, None)
    return TrainConfig(
        out=str(out / f"{arm.replace(' ', '-')}-{seed}"),
        model=ARMS[arm].model,
        data="fashion-mnist",
        steps=steps,
        batch_size=round(batch_size * picture_flops("ELIT") / each),
        budget_min=budgets[0],
        budget_max=budgets[1],
        learning_rate=1e-3,
        warmup_steps=300,
        ema_decay=0.999,
        precision="bf16",
        compile=True,
        seed=seed,
        log_every=50,
        checkpoint_every=min(MILESTONE // 10, steps),
        keep_every=MILESTONE,
        keep_last=1,
        preview_every=0,
        resume=True,
    )


@cache
def picture_flops(arm: str) -> float:
    """Training FLOPs of one picture: 3 forwards, in the mean over the budgets drawn (PAPER section 5)."""
    settings: dict[str, Any] = {"sample_size": 32, "in_channels": 1, "num_classes": 10}
    network = DiT(**model_config(**ARMS[arm].model.arguments(), **settings)[1])
    drawn = training_budgets(network.budgets, *ARMS[arm].budgets) if network.budgets else (None,)
    return 3 * sum(count_flops(network, budget=budget) for budget in drawn) / len(drawn)


def train(arm: str, config: TrainConfig) -> None:
    """Trains an arm, or goes on with it."""
    with random_drop() if ARMS[arm].random_drop else patch.dict({}):
        training.train(config)


@contextmanager
def random_drop() -> Iterator[None]:
    """Makes training build `RandomDropDiT` inside the block."""
    make = patch.object(training, "create_model", lambda name, **kw: RandomDropDiT(**model_config(name, **kw)[1]))
    with make:
        yield


def milestones(config: TrainConfig) -> list[tuple[int, Path]]:
    """(step, checkpoint) of every milestone that a run has passed."""
    saved = checkpoints(Path(config.out) / "checkpoints")
    return [(checkpoint_step(path), path) for path in saved if checkpoint_step(path) % MILESTONE == 0]


def load(arm: str, checkpoint: Path, *, redrawn: bool = False) -> DiT:
    """The averaged weights of a checkpoint. redrawn: with a random set of latents in every forward."""
    with patch.dict(NETWORKS, {RandomDropDiT.__name__: DiT}):  # trained so, it is run as any other
        network = load_model(checkpoint)
    assert isinstance(network, DiT)
    if not redrawn:
        return network
    other = RandomDropDiT.from_config(network.config).eval()
    other.load_state_dict(network.state_dict())
    return other
