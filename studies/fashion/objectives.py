"""Does another draw, weight or loss over budgets close the gap between ELIT-MB and ELIT at the full budget?

    OMP_NUM_THREADS=1 nice python studies/fashion/objectives.py

Tiny networks (depth 6, width 64) on Fashion-MNIST, 500 steps each; a step of every arm costs what a step of ELIT at all
16 latents with batch 32 costs, teachers included, so a dearer objective gets a smaller batch. Killed and started again,
it goes on. The arms:

    uniform       budgets drawn evenly from 1 to 16 (the paper)
    full only     ELIT at all latents: what there is to gain
    favoured      half of the draws are the full budget, the others even
    weighted      the loss of a step is multiplied by its budget, over the mean budget
    beside full   every step runs the full budget, which learns the velocity, and a drawn one, which learns what the
                  full budget says (stop-gradient); both share the head, each loss counts half
    aligned       the latents of the core's second block, at the drawn budget, predict by a small MLP those that its
                  last block has at the full budget and a time 0.2 nearer to data (stop-gradient); 0.2·(1 − cosine)
                  is added

The rule, fixed before the first run. An objective is a candidate if with seeds 0, 1 and 2 its FD at the full budget is
below uniform's with every seed, by more than 2 standard errors of the mean over seeds, and its mean FD at a quarter of
the latents is at most 5% above uniform's. Of four objectives one would pass by chance too often, so a candidate wins
only if the same holds again with seeds 3, 4 and 5. What wins becomes an option of elit train; nothing else does.
FD: 1,000 samples, 8 Euler steps, no guidance.
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from runs import LATENTS, ROOT
from scores import Scores, held_out_loss, score
from torch import Tensor, nn
from verdicts import standard_error, verdict

import elit
from elit.config import ModelConfig, TrainConfig
from elit.costs.flops import count_flops, shared_flops
from elit.data.loader import Batch
from elit.files import write_text
from elit.flow.path import flow_matching_loss, interpolate
from elit.models.dit import DiT
from elit.sampling.sample import sample
from elit.training.loop import train_task
from elit.training.task import Draws, FlowMatching
from elit.training.train import TrainNetwork

MODEL = ModelConfig(name="ELIT-DiT-S/4", hidden_size=64, depth=6, num_heads=2, split=(1, 4, 1), window=(4, 4))
ARMS = ("uniform", "full only", "favoured", "weighted", "beside full", "aligned")
SCORED = (LATENTS, LATENTS // 4)
ALLOWED = 0.05  # by so much the FD at a quarter of the latents may be higher
WEIGHT, CLEANER = 0.2, 0.2  # of the alignment: its weight, and how much nearer to data the teacher is


class AlignedDiT(DiT):
    """Keeps what an early and the last block of the core have made, and predicts the one from the other."""

    def build(self) -> None:
        super().build()
        width, core = self.config.hidden_size, self.stages()[1]
        self.predictor = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.early, self.late = torch.empty(0), torch.empty(0)
        core[len(core) // 2 - 1].register_forward_hook(lambda module, inputs, output: setattr(self, "early", output))
        core[-1].register_forward_hook(lambda module, inputs, output: setattr(self, "late", output))


class Weighted(FlowMatching):
    def losses(self, model: nn.Module, batch: Batch, draws: Draws, budget: int | None) -> tuple[Tensor, Tensor]:
        t, losses = super().losses(model, batch, draws, budget)
        return t, losses * cast(int, budget) / ((1 + LATENTS) / 2)


class BesideFull(FlowMatching):
    def losses(self, model: nn.Module, batch: Batch, draws: Draws, budget: int | None) -> tuple[Tensor, Tensor]:
        images, y, noise, t, x = self.noised(batch, draws)
        full, some = model(x, t, y, [LATENTS, budget], share_head=True).chunk(2)
        teacher = full.detach()
        return t, (flow_matching_loss(full, noise, images) + (some - teacher).square().flatten(1).mean(1)) / 2


class Aligned(FlowMatching):
    def losses(self, model: nn.Module, batch: Batch, draws: Draws, budget: int | None) -> tuple[Tensor, Tensor]:
        images, y, noise, t, x = self.noised(batch, draws)
        network, cleaner = cast(AlignedDiT, model), (t + CLEANER).clamp(max=1)
        with torch.no_grad():
            network(interpolate(noise, images, cleaner), cleaner, y, LATENTS)
            teacher = network.late.unflatten(1, (-1, LATENTS))[:, :, :budget]
        losses = flow_matching_loss(network(x, t, y, budget), noise, images)
        student = network.predictor(network.early).unflatten(1, (-1, cast(int, budget)))
        return t, losses + WEIGHT * (1 - F.cosine_similarity(student, teacher, dim=-1).mean((1, 2)))


OBJECTIVES: dict[str, type[FlowMatching]] = {"weighted": Weighted, "beside full": BesideFull, "aligned": Aligned}


class Arm(TrainNetwork):
    """A run with the draw and the objective of an arm."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, arm: str):
        super().__init__(config, accelerator)
        self.arm = arm
        if arm == "favoured":
            self.budgets = favoured(self.budgets)
        elif arm == "aligned":
            torch.manual_seed(config.seed)
            self.network = AlignedDiT.from_config(self.network.config)
            self.blocks = self.network.blocks

    def objective(self, accelerator: Accelerator) -> FlowMatching:
        plain = super().objective(accelerator)
        return OBJECTIVES.get(self.arm, FlowMatching)(**vars(plain))


def favoured(budgets: Sequence[int]) -> tuple[int, ...]:
    """Each budget once, and the full one as often as all of them."""
    return (*budgets, *(budgets[-1],) * len(budgets))


def picture_flops(arm: str) -> float:
    """Training FLOPs of one picture, mean over the draws: 3 forwards, and 1 of a teacher that has its own."""
    settings = MODEL.arguments() | {"sample_size": 32, "in_channels": 1, "num_classes": 10}
    network = elit.create_model(**settings)
    cost = {budget: count_flops(network, budget=budget) for budget in network.budgets}
    drawn = {"full only": (LATENTS,), "favoured": favoured(network.budgets)}.get(arm, network.budgets)
    forwards = statistics.mean(cost[budget] for budget in drawn)
    if arm == "beside full":
        forwards += cost[LATENTS] - shared_flops(network)
    return 3 * forwards + (cost[LATENTS] if arm == "aligned" else 0)


def run_config(arm: str, seed: int, args: argparse.Namespace) -> TrainConfig:
    return TrainConfig(
        out=str(args.runs / f"{arm.replace(' ', '-')}-{seed}"),
        model=MODEL,
        data=args.data,
        steps=args.steps,
        batch_size=round(args.batch_size * picture_flops("full only") / picture_flops(arm)),
        budget_min=LATENTS if arm == "full only" else None,
        learning_rate=2e-3,
        warmup_steps=min(50, args.steps),
        ema_decay=0.99,
        seed=seed,
        checkpoint_every=min(200, args.steps),
        keep_last=1,
        preview_every=0,
        resume=True,
    )


def scores_of(arm: str, seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains an arm, or goes on with it, and scores it: a row a budget."""
    config, known = run_config(arm, seed, args), Scores(args.runs / "scores.jsonl")

    def train() -> DiT:
        if not (Path(config.out) / "model").is_dir():
            train_task(config, lambda accelerator: Arm(config, accelerator, arm))
        return cast(DiT, elit.load_model(Path(config.out) / "model"))

    rows = []
    for budget in SCORED[:1] if arm == "full only" else SCORED:

        def make(budget: int = budget) -> dict[str, float]:
            model, labels = train(), torch.arange(args.samples) % 10
            images = sample(model, labels, seed=5000, batch_size=50, steps=args.solver_steps, budget=budget)
            return score(images, labels) | {"loss": held_out_loss(model, budget, count=min(args.samples, 1000))}

        key = {"arm": arm, "seed": seed, "budget": budget, "samples": args.samples, "steps": args.steps}
        scores = known.get(key | {"batch_size": args.batch_size, "solver_steps": args.solver_steps}, make)
        rows.append({"arm": arm, "seed": seed, "budget": budget, "batch_size": config.batch_size, **scores})
        print(rows[-1], flush=True)
    return rows


def judge(rows: Sequence[dict[str, Any]], arm: str, seeds: Sequence[int]) -> dict[str, Any]:
    """An objective against the uniform draw, by the rule above, on these seeds."""

    def distances(arm: str, budget: int) -> list[float]:
        found = {row["seed"]: row["FD"] for row in rows if (row["arm"], row["budget"]) == (arm, budget)}
        return [found[seed] for seed in seeds]

    full, quarter = ([distances(name, budget) for name in ("uniform", arm)] for budget in SCORED)
    advantages = [uniform - other for uniform, other in zip(*full, strict=True)]
    higher = statistics.mean(quarter[1]) / statistics.mean(quarter[0]) - 1
    holds = verdict(advantages)
    passes = holds == "holds" and higher <= ALLOWED
    judged = {"arm": arm, "seeds": list(seeds), "advantages": advantages, "error": standard_error(advantages)}
    return judged | {"full": holds, "quarter_higher_by": higher, "passes": passes}


def main(line: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each of the two rounds")
    parser.add_argument("--steps", type=int, default=500, help="training steps of every arm")
    parser.add_argument("--batch-size", type=int, default=32, help="of ELIT at all latents")
    parser.add_argument("--samples", type=int, default=1000, help="samples behind every Fréchet distance")
    parser.add_argument("--solver-steps", type=int, default=8)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "objectives")
    parser.add_argument("--out", type=Path, default=ROOT / "studies" / "results" / "fashion" / "objectives.json")
    args = parser.parse_args(line)
    torch.set_num_threads(1)
    first, second = range(args.seeds), range(args.seeds, 2 * args.seeds)
    rows = [row for seed in first for arm in ARMS for row in scores_of(arm, seed, args)]
    parts = [judge(rows, arm, first) for arm in ARMS[2:]]
    if candidates := [part["arm"] for part in parts if part["passes"]]:
        rows += [row for seed in second for arm in ("uniform", *candidates) for row in scores_of(arm, seed, args)]
        parts += [judge(rows, arm, second) for arm in candidates]
    winners = [part["arm"] for part in parts if part["seeds"] == list(second) and part["passes"]]
    for part in parts:
        print(part)
    content = {
        "command": " ".join(["python", "studies/fashion/objectives.py", *(sys.argv[1:] if line is None else line)]),
        "training_gflops_a_picture": {arm: round(picture_flops(arm) / 1e9, 4) for arm in ARMS},
        "versions": {"elit": elit.__version__, "torch": torch.__version__, "python": platform.python_version()},
        **{name: getattr(args, name) for name in ("steps", "batch_size", "samples", "solver_steps")},
        "winners": winners,
        "parts": parts,
        "rows": rows,
    }
    write_text(args.out, json.dumps(content, indent=1) + "\n")
    print(f"winners: {', '.join(winners) or 'none'} -> {args.out}")


if __name__ == "__main__":
    main()
