"""A study's result file: every seed's numbers, the verdicts, and what made them."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from arms import SIZES, training_tflops
from verdicts import overall, standard_error, verdict

import elit
from elit.config import TrainConfig
from elit.files import write_text

Values = Mapping[tuple[str, str], Mapping[int, float]]
"""(arm, metric) -> seed -> value."""


class Record:
    """Measurements of a study, written after every seed, so that an early stop leaves a valid file."""

    def __init__(self, args: argparse.Namespace, claim: int, notes: str):
        self.args, self.claim, self.notes = args, claim, notes
        self.values: dict[tuple[str, str], dict[int, float]] = {}
        self.arms: dict[str, dict[str, Any]] = {}
        self.parts: list[tuple[str, str, Callable[[Values, int], float]]] = []
        self.start = time.perf_counter()

    def arm(self, name: str, config: TrainConfig, tflops: float | None = None) -> None:
        """Notes what an arm trained on."""
        model = {key: value for key, value in config.model.arguments().items() if key not in SIZES}
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
            {
                "arm": arm,
                "metric": metric,
                "values": [values[seed] for seed in done],
                **spread([values[s] for s in done]),
            }
            for (arm, metric), values in self.values.items()
        ]
        parts: list[dict[str, Any]] = []
        for says, unit, advantage in self.parts:
            advantages = [advantage(self.values, seed) for seed in done]
            measured = {"advantages": advantages, "mean": statistics.mean(advantages)}
            error = standard_error(advantages) if len(done) > 1 else None
            parts.append(
                {"says": says, "unit": unit, **measured, "standard_error": error, "verdict": verdict(advantages)}
            )
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
