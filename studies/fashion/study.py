"""A study's result: every number, the verdicts by a rule fixed before the runs, and what made them."""

import argparse
import json
import math
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from runs import ARMS, BATCH_SIZE, LATENTS, ROOT, STEPS, load, milestones, picture_flops, run_config
from scores import Scores, draw_and_score, held_out_loss

import elit
from elit.files import write_text
from elit.models.dit import DiT

SIGMAS = 2.0  # an advantage counts from so many standard errors on
CLEAR = 4.0  # and one seed is enough from so many on


def verdict(advantages: Sequence[float], errors: Sequence[float]) -> str:
    """One advantage a seed, positive where the claim is right, with its standard error.

    Holds: every seed's advantage is more than SIGMAS standard errors above 0; does not hold: the same below 0; else
    undecided. A single seed decides only from CLEAR standard errors on.
    """
    least = SIGMAS if len(advantages) > 1 else CLEAR
    sigmas = [advantage / max(error, 1e-12) for advantage, error in zip(advantages, errors, strict=True)]
    if sigmas and min(sigmas) > least:
        return "holds"
    if sigmas and max(sigmas) < -least:
        return "does not hold"
    return "undecided"


class Study:
    """Scores trained arms and writes studies/results/fashion/NAME.json."""

    def __init__(self, name: str, about: str | None, line: Sequence[str] | None):
        parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="scored now")
        parser.add_argument("--add", action="store_true", help="to the results in --out, whose other seeds stay")
        parser.add_argument("--samples", type=int, default=2000, help="behind a Fréchet distance")
        parser.add_argument("--milestone-samples", type=int, default=1000, help="the same before the last milestone")
        parser.add_argument("--solver-steps", type=int, default=16)
        parser.add_argument("--steps", type=int, default=STEPS, help="training steps, as in train.py")
        parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="of the reference arm, as in train.py")
        parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "fashion")
        parser.add_argument("--out", type=Path, default=ROOT / "studies" / "results" / "fashion" / f"{name}.json")
        self.args = parser.parse_args(line)
        words = [f"studies/fashion/{name}.py", *(sys.argv[1:] if line is None else line)]
        self.name, self.command = name, shlex.join(["python", *words])
        self.seeds: list[int] = sorted(set(self.args.seeds))
        self.rows: list[dict[str, Any]] = []
        if self.args.add:
            self._add_to(parser)
        self.scores = Scores(self.args.runs / "scores.jsonl")
        self.networks: dict[tuple[str, bool], DiT] = {}
        self.parts: list[dict[str, Any]] = []
        torch.set_num_threads(1)

    def _add_to(self, parser: argparse.ArgumentParser) -> None:
        """Takes over the rows of seeds that are not scored now; ends with one line where they cannot be compared."""
        if not self.args.out.is_file():
            parser.error(f"--add: no results at {self.args.out}; leave --add out for the first")
        before = json.loads(self.args.out.read_text(encoding="utf-8"))
        if before["samples"] != self.args.samples:
            parser.error(f"--samples {self.args.samples}: the results at {self.args.out} have {before['samples']}")
        self.rows = [row for row in before["rows"] if row["seed"] not in self.args.seeds]
        self.seeds = sorted({*before["seeds"], *self.args.seeds})
        commands = [command for command in before["command"].split("; ") if command != self.command]
        self.command = "; ".join([*commands, self.command])

    def network(self, arm: str, seed: int, *, redrawn: bool = False) -> tuple[int, DiT]:
        """(step, network) of an arm's last milestone. Raises SystemExit where it has not been trained so far."""
        config = run_config(arm, seed, out=self.args.runs, steps=self.args.steps, batch_size=self.args.batch_size)
        passed = milestones(config)
        if not passed:
            raise SystemExit(f"{arm}, seed {seed}: not trained yet; run python studies/fashion/train.py first")
        step, path = passed[-1]
        return step, load(arm, path, redrawn=redrawn)

    def curve(self, arm: str, seed: int, *, budget: int | None = None, way: str = "", redrawn: bool = False) -> None:
        """Loss, FD and accuracy of an arm at every milestone, without guidance; of sets drawn anew at the last."""
        config = run_config(arm, seed, out=self.args.runs, steps=self.args.steps, batch_size=self.args.batch_size)
        passed = milestones(config)
        for step, path in passed[-1:] if redrawn else passed:
            last = step == passed[-1][0]
            count = self.args.samples if last else self.args.milestone_samples

            def make(path: Path = path, count: int = count) -> dict[str, float]:
                torch.manual_seed(seed)  # of the sets that are drawn anew
                network = self._with_weights_of(arm, path, redrawn=redrawn)
                scores = draw_and_score(network, count=count, steps=self.args.solver_steps, budget=budget)
                return scores | {"loss": held_out_loss(network, budget, count=min(count, 2000))}

            latents = budget or (LATENTS if ARMS[arm].elit else None)  # all of them under one name
            key = {"arm": arm, "seed": seed, "step": step, "budget": latents, "redrawn": redrawn, "samples": count}
            scores = self.scores.get(key | {"solver_steps": self.args.solver_steps, "training": self.args.steps}, make)
            self.row(f"{arm}{way}", seed, scores, step=step, pictures=step * config.batch_size)

    def _with_weights_of(self, arm: str, checkpoint: Path, *, redrawn: bool) -> DiT:
        """One network an arm, which is given the weights of a checkpoint: so it is compiled once."""
        loaded = load(arm, checkpoint, redrawn=redrawn)
        network = self.networks.setdefault((arm, redrawn), loaded)
        network.load_state_dict(loaded.state_dict())  # pyrefly: ignore[missing-attribute]
        return network

    def row(self, name: str, seed: int, scores: Mapping[str, float], **more: Any) -> None:
        self.rows.append({"name": name, "seed": seed, **more, **scores})

    def last(self, name: str, seed: int) -> dict[str, Any]:
        return [row for row in self.rows if (row["name"], row["seed"]) == (name, seed)][-1]

    def compare(self, says: str, better: str, worse: str, *, allowed: float = 0.0) -> None:
        """A part of the claim: `better` has the lower FD than `worse` in every seed.

        allowed: share by which it may be higher, for "no worse".
        """
        advantages, errors = [], []
        for seed in self.seeds:
            a, b = self.last(better, seed), self.last(worse, seed)
            advantages.append((1 + allowed) * b["FD"] - a["FD"])
            errors.append(math.hypot(a["FD_error"], b["FD_error"]))
        decided = verdict(advantages, errors)
        self.parts.append({"says": says, "advantages": advantages, "errors": errors, "verdict": decided})
        print(
            f"{decided:14} {says}: {', '.join(f'{a:+.2f} ± {e:.2f}' for a, e in zip(advantages, errors, strict=True))}"
        )

    def write(self, notes: str, **more: Any) -> None:
        verdicts = [part["verdict"] for part in self.parts]
        arms = {name: round(picture_flops(name) / 1e9, 3) for name in ARMS}
        content = {
            "study": self.name,
            "command": self.command,
            "notes": notes,
            "verdict": next((v for v in ("does not hold", "undecided") if v in verdicts), "holds"),
            "seeds": self.seeds,
            "samples": self.args.samples,
            "training_gflops_a_picture": arms,
            "versions": {"elit": elit.__version__, "torch": torch.__version__, "python": platform.python_version()},
            **more,
            "parts": self.parts,
            "rows": self.rows,
        }
        write_text(self.args.out, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        print(f"{self.name}: {content['verdict']} -> {self.args.out}")
