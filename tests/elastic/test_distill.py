"""elit distill of this library's DiT: low budgets come closer to the original, only what was asked for is trained."""

import json

import pytest
import torch

import elit
from elit.cli.main import main
from elit.config import DistillConfig
from elit.data.builtin import digits
from elit.elastic.distill import distill

pytestmark = pytest.mark.slow

SMALL = {"sample_size": 8, "in_channels": 1, "num_classes": 10, "hidden_size": 24, "num_heads": 2, "depth": 4}


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    made = elit.create_model("DiT-S/1", **SMALL)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def settings(saved, **changes):
    given = {"read_after": 1, "write_after": 3, "window": (4, 4), "mode": "learned", "batch_size": 16, "steps": 30}
    given |= {"learning_rate": 3e-3, "warmup_steps": 1, "distillation": 1000.0, "trackers": (), "data": "digits"}
    return DistillConfig(pipeline=str(saved), out=str(saved.parent / "out"), **given | changes)


@pytest.mark.parametrize("weights", ["all", "lora", "interface"])
def test_brings_low_budgets_closer(saved, weights):
    result = distill(settings(saved, weights=weights, lora_rank=2))
    row = next(row for row in result["validation"] if row["tokens"] == 4)
    assert row["distance"] < 0.95 * row["distance_before"]
    made, before = elit.load_elastic(result["model"]), elit.load_model(saved)
    own = dict(before.named_parameters())
    moved = {name for name, value in made.named_parameters() if name in own and not value.equal(own[name])}
    assert bool(moved) == made.elastic_record.changed == (weights == "all")
    assert made.elastic_record.lora_rank == (2 if weights == "lora" else 0)
    changes, parts = getattr(made.elastic, "low_rank", {}), ("attention-qkv", "attention-proj", "mlp-fc1", "mlp-fc2")
    assert set(changes) == {f"blocks-{i}-{part}" for i in range(4) for part in parts if weights == "lora"}
    assert all(change.up.weight.any() for change in changes.values())
    x, t, y = digits().images[:32], torch.linspace(0, 1, 32), digits().labels[:32]
    with torch.no_grad():
        assert torch.equal(made(x, t, y), before(x, t, y)) == (weights != "all")  # at full budget the original runs
        assert made(x, t, y, 1).isfinite().all()


def test_the_command_and_its_one_line_errors(saved, capsys):
    out = str(saved.parent / "out")
    words = ["distill", str(saved), out, "--data", "digits", "--window", "4", "4", "--steps", "2", "--batch-size", "8"]
    assert main([*words, "--read-after", "1", "--write-after", "3", "--lora-rank", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["tokens"] for row in told["validation"]] == [16, 8, 4, 2]
    assert elit.load_model(told["model"]).budgets == tuple(range(1, 17))
    for wrong, message in (
        ([*words[:3], "--window", "4", "4"], "data must be given for a network of this library"),
        ([*words[:3], "--data", "moving-digits"], "data must have samples of shape"),
        ([*words, "--budget-max", "16"], "<= budget_max <= 15, got 1 and 16"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
