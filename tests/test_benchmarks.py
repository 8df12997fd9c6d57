"""The benchmarks run and print what they promise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_forward():
    line = ["--size", "S", "--sample-size", "16", "--batch-size", "1", "--rounds", "1", "--json"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "forward.py", *line], capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert [row["budget"] for row in result["rows"]] == [None, 4, 3, 2, 1]
    assert result["rows"][1]["time_over_flops"] == pytest.approx(1)
    assert result["full_over_baseline"]["flops"] > 1


def test_train_step():
    line = ["--sample-size", "16", "--batch-size", "2", "--steps", "8", "--rounds", "1", "--json"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "train_step.py", *line], capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert [row["model"] for row in result["rows"]] == ["DiT-S/2", "ELIT-DiT-S/2"]
    assert all(row["images_per_s"] > 0 and 0 <= row["data_wait"] < 1 for row in result["rows"])
    assert 0.3 < result["elit_over_baseline"]["flops"] < 1.2
