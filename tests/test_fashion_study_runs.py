"""Each study on Fashion-MNIST from end to end: tiny networks of a few steps, on pictures that the test makes."""

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import idx

from elit.sampling.sample import sample

sys.path.insert(0, str(Path(__file__).parents[1] / "studies" / "fashion"))

import borders
import runs
import scores
import train

pytestmark = pytest.mark.slow

STUDIES = ("headline", "claim2", "claim4", "claim5", "claim6", "claim7", "dial", "windows")
SIZES = ["--steps", "10", "--batch-size", "4"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of IDX files as Fashion-MNIST's: ten classes, 28×28."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 40), ("t10k", 20)):
        images = torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(idx(images))
        labels = torch.arange(count, dtype=torch.uint8) % 10
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


@pytest.fixture(scope="module")
def tiny(pictures):
    """The studies with all of their arms at a width of 16, nothing compiled, samples in one step."""
    with pytest.MonkeyPatch.context() as patch:
        size = runs.Arm.model.fget
        patch.setattr(runs.Arm, "model", property(lambda arm: replace(size(arm), hidden_size=16, num_heads=1)))
        patch.setattr(runs, "MILESTONE", 10)
        real, cheap = runs.training.train, {"compile": False, "precision": "fp32", "checkpoint_every": 10}
        patch.setattr(runs.training, "train", lambda config: real(replace(config, **cheap)))
        quick = {"steps": 1, "compile": False, "dtype": torch.float32}
        patch.setattr(scores, "sample", lambda *inputs, **settings: sample(*inputs, **settings | quick))
        patch.setattr("elit.data.builtin.FASHION_MNIST", pictures)
        scores.test_pictures.cache_clear()
        runs.picture_flops.cache_clear()
        yield
    scores.test_pictures.cache_clear()
    runs.picture_flops.cache_clear()


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    train.main(["--arms", *runs.ARMS, *SIZES, "--out", str(folder)])
    return folder


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_runs_on_what_was_trained(name, trained, tmp_path):
    out = tmp_path / "result.json"
    few = ["--samples", "20", "--milestone-samples", "20", "--solver-steps", "1"]
    importlib.import_module(name).main([*few, *SIZES, "--runs", str(trained), "--out", str(out)])
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["study"] == name
    assert result["seeds"] == [0]
    assert result["parts"]
    for row in result["rows"]:
        values = [value for value in row.values() if isinstance(value, float)]
        assert values
        assert all(map(math.isfinite, values))


def test_borders_are_cut_as_they_say(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "borders.json"
    monkeypatch.setattr(borders, "BUDGETS", (0.25,))
    monkeypatch.setattr(sys, "argv", ["borders.py", "--count", "2", "--out", str(out)])
    borders.main()
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert {row["case"] for row in rows} == {"32", "32, recut", "28"}
    for row in rows:
        assert (row["change"] == 0) == (row["case"] == "32")
