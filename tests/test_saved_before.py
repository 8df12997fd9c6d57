"""Files that version 0.1.0 saved still load, and give what they gave there.

saved-0.1.0.tar.xz was written by commit 8405627, before modules moved into rooms: a pipeline, an elastified
transformer, a run's folder with a checkpoint, the table of a sweep; and expected.json, the outputs of its networks.
"""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import elit
from elit.budgets import schedule_budgets
from elit.config import load_config
from elit.planner.quality import read_quality
from elit.training.train import train

ARCHIVE = Path(__file__).parent / "saved-0.1.0.tar.xz"
X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
T, Y = torch.tensor([0.2, 0.7]), torch.tensor([3, 10])


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def check(saved: Path, name: str, outputs: list[torch.Tensor]) -> None:
    expected = json.loads((saved / "expected.json").read_text())[name]
    for output, values in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output.flatten()[:5], torch.tensor(values), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_pipeline(saved):
    pipe = elit.ElitPipeline.from_pretrained(saved / "pipeline")
    model = elit.load_model(saved / "pipeline")
    for network in (pipe.transformer, model):
        check(saved, "pipeline", [network(X, T, Y, budget) for budget in (None, 2)])


@torch.no_grad()
def test_an_elastified_transformer(saved):
    transformer = elit.load_elastic(saved / "elastified")
    with elit.budget(2):
        check(saved, "elastified", [transformer(X, T, Y)])


@torch.no_grad()
def test_a_checkpoint_gives_its_averaged_weights(saved):
    check(saved, "run", [elit.load_model(saved / "run/checkpoints/step-00000002")(X, T, Y, 2)])


def test_a_run_goes_on_as_it_would_have_there(saved):
    config = load_config(saved / "run/config.yaml")
    network = train(replace(config, out=str(saved / "run"), steps=4, resume=True))
    with torch.no_grad():
        check(saved, "longer", [network(X, T, Y, 2)])


def test_a_sweep_table_keeps_the_meaning_of_its_schedules(saved):
    """ "0.5@0-0.5,1@0.5-1" was half of the latents and then all; as text, a bare 1 is one latent today."""
    budgets = [
        schedule_budgets(curve.setting.budget, [0.0, 0.5], range(1, 5))
        for curve in read_quality(saved / "sweep.jsonl").curves
    ]
    assert sorted(budgets) == [[2, 2], [2, 4]]
