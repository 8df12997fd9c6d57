"""Tests that `elit sample` keeps to a target in its first run, each as a user starts it: a process of its own.

    python benchmarks/targets.py                      # the quickstart's network; two minutes, nothing else running
    python benchmarks/targets.py --model fashion --targets "--target-ms 900"

The first command measures this machine, as a new user's does; the others find the profile. `taken` is of the pictures,
without start, autoencoder and files, as the target is. A target below what is possible must be refused before anything
is measured for it: its seconds stand beside those of a plain run of one step.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import elit
from elit.config import load_config
from elit.evaluate.tables import print_table
from elit.models.saved import save_model
from elit.pretrained import model_folder

TARGETS = ("--target-ms 400", "--target-images-per-s 20", "--target-ms 150 --count 1", "--target-gflops 0.5")
IMPOSSIBLE = "--target-ms 0.5"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a saved model; default: the quickstart's, untrained")
    parser.add_argument("--targets", nargs="+", default=TARGETS, help="options of elit sample, several in quotes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        model = str(model_folder(args.model).absolute()) if args.model else quickstart_network(work / "model")
        plain, _ = run(["sample", model, "--steps", "1", "--count", "1"], work)
        refused, line = run(["sample", model, *shlex.split(IMPOSSIBLE), "--overwrite"], work)
        rows = [row_of(model, target, work) for target in args.targets]
    print_table(["target", "asked", "predicted", "taken", "taken / asked", "pictures", "seconds in all"], rows)
    print(f"{IMPOSSIBLE}: refused in {refused:.1f} s, {refused / plain:.2f} of a plain run's {plain:.1f} s: {line}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")


def quickstart_network(folder: Path) -> str:
    sizes = load_config("recipe:quickstart/dit").model.arguments() | {
        "sample_size": 8,
        "in_channels": 1,
        "num_classes": 10,
    }
    save_model(elit.create_model(**sizes), folder)
    return str(folder)


def run(line: list[str], work: Path) -> tuple[float, Any]:
    """Seconds of a command, and what it printed last."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "elit", *line], capture_output=True, text=True, cwd=work)
    output = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return time.perf_counter() - start, output[-1] if output else ""


def row_of(model: str, target: str, work: Path) -> list[str]:
    options = ["--out", "picture.png", "--overwrite", "--json"]
    seconds, line = run(["sample", model, *shlex.split(target), *options], work)
    result = json.loads(line)
    name, value = shlex.split(target)[:2]
    count = result["count"]
    if name == "--target-gflops":
        asked, taken, predicted, unit = float(value), result["gflops_per_image"], None, "GFLOPs"
    else:
        asked = float(value) if name == "--target-ms" else 1e3 * count / float(value)
        taken, predicted, unit = count * result["ms_per_image"], result["plan"]["ms"], "ms"
    cells = [f"{asked:.4g} {unit}", "" if predicted is None else f"{predicted:.4g} {unit}", f"{taken:.4g} {unit}"]
    return [target, *cells, f"{taken / asked:.2f}", str(count), f"{seconds:.1f}"]


if __name__ == "__main__":
    main()
