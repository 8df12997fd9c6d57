"""The studies on Fashion-MNIST: their rule, their arms, budgets of windows, and each in a few tiny steps."""

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

import report
import runs
import scores
import study
import train

pytestmark = pytest.mark.slow

RESULTS = runs.ROOT / "studies" / "results" / "fashion"


@pytest.mark.parametrize(
    ("advantages", "expected"),
    [
        *(([5.0], "holds"), ([3.0, 2.5], "holds"), ([-5.0], "does not hold"), ([-3.0, -2.5], "does not hold")),
        *(([3.0], "undecided"), ([3.0, 1.0], "undecided")),
    ],
)
def test_a_verdict_needs_two_standard_errors_in_every_seed_or_four_in_one(advantages, expected):
    assert study.verdict(advantages, [1.0] * len(advantages)) == expected


@pytest.mark.parametrize("name", report.load(RESULTS))
def test_verdicts_in_the_repository_are_by_the_rule(name):
    result = report.load(RESULTS)[name]
    for part in result["parts"]:
        assert len(part["advantages"]) == len(result["seeds"])
        assert part["verdict"] == study.verdict(part["advantages"], part["errors"])


def test_every_arm_has_the_training_flops_of_the_reference(tmp_path):
    step = runs.picture_flops("ELIT") * runs.BATCH_SIZE
    for name in runs.ARMS:
        config = runs.run_config(name, 0, out=tmp_path)
        assert config.batch_size * runs.picture_flops(name) == pytest.approx(step, rel=0.01)
        assert config.steps * config.batch_size >= 300_000
        assert config.steps % runs.MILESTONE == 0


@pytest.fixture(scope="module")
def uncounted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("elit.training.train.count_flops", lambda network, budget: 1)
        yield


STUDIES = ("headline", "claim6", "windows")  # the others are made of the same parts
SIZES = ["--steps", "10", "--batch-size", "4"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 40), ("t10k", 20)):
        images = torch.randint(256, (count, 28, 28), dtype=torch.uint8)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx(torch.arange(count, dtype=torch.uint8) % 10))
    return folder


@pytest.fixture(scope="module")
def tiny(pictures, uncounted):
    caches = scores.test_pictures, runs.picture_flops
    with pytest.MonkeyPatch.context() as patch:
        size = runs.Arm.model.fget
        patch.setattr(runs.Arm, "model", property(lambda arm: replace(size(arm), hidden_size=16, num_heads=1)))
        patch.setattr(runs, "MILESTONE", 10)
        real, cheap = runs.training.train, {"compile": False, "precision": "fp32", "checkpoint_every": 10}
        patch.setattr(runs.training, "train", lambda config: real(replace(config, **cheap)))
        quick = {"steps": 1, "compile": False, "dtype": torch.float32}
        patch.setattr(scores, "sample", lambda *inputs, **settings: sample(*inputs, **settings | quick))
        patch.setattr("elit.data.builtin.FASHION_MNIST", pictures)
        [each.cache_clear() for each in caches]
        yield
    [each.cache_clear() for each in caches]


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
    assert (result["study"], result["seeds"], bool(result["parts"])) == (name, [0], True)
    for row in result["rows"]:
        values = [value for value in row.values() if isinstance(value, float)]
        assert values
        assert all(map(math.isfinite, values))
