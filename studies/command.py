"""The command line that all studies take."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


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
