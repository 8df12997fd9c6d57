"""The benchmarks run and print what they promise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import elit
from elit.checkpoint import save_model

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


def test_planner(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_heads": 1, "depth": 3, "split": (1, 1, 1), "window": (4, 4)}
    model = elit.create_model("ELIT-DiT-S/1", sample_size=8, in_channels=1, num_classes=10, **sizes)
    save_model(model, tmp_path / "model")
    line = ["--quick", "--model", "model", "--work", "work", "--out", "result.json"]
    subprocess.run([sys.executable, BENCHMARKS / "planner.py", *line], check=True, cwd=tmp_path)
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert {"command", "versions", "hardware", "seconds"} <= set(result)
    assert (len(result["unseen"]), len(result["targets"])) == (4, 3)
    assert all(row["ms"] > 0 and row["predicted_ms"] > 0 for row in result["unseen"])
    assert all(row["predicted_ms"] <= row["target_ms"] and row["fd"] > 0 for row in result["targets"])
    assert result["summary"]["settings"] == 4
