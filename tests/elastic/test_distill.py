"""Distillation of this library's DiT: low budgets come closer to the original, only what was asked for is trained."""

import pytest
import torch

import elit
from elit.cli.main import main
from elit.config import DistillConfig
from elit.data.digits import digits, moving_digits
from elit.elastic.distill import prepare_student
from elit.elastic.distill_network import distill_network
from elit.elastic.runtime import original

pytestmark = pytest.mark.slow

SMALL = {"sample_size": 8, "in_channels": 1, "num_classes": 10, "hidden_size": 24, "num_heads": 2, "depth": 4}


def network():
    torch.manual_seed(0)
    made = elit.create_model("DiT-S/1", **SMALL)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def settings(out, **changes):
    given = {"read_after": 1, "write_after": 3, "window": (4, 4), "mode": "learned", "batch_size": 16, "steps": 30}
    given |= {"learning_rate": 3e-3, "warmup_steps": 1, "distillation": 1000.0, "trackers": (), "preview_every": 0}
    return DistillConfig(out=str(out), **given | changes)


def student(config):
    made = network()
    prepare_student(made, config)
    return made


def some_inputs():
    data = digits()
    return data.images[:32], torch.linspace(0, 1, 32), data.labels[:32]


def weights_of(model):
    return {name: value.clone() for name, value in model.named_parameters() if not name.startswith("elastic.")}


@pytest.mark.parametrize("weights", ["all", "lora", "interface"])
def test_brings_low_budgets_closer(tmp_path, weights):
    config = settings(tmp_path, weights=weights)
    made, (x, t, y) = student(config), some_inputs()
    blocks = weights_of(made)
    with torch.no_grad(), original():
        right = made(x, t, y)

    def error():
        with torch.no_grad():
            return float((made(x, t, y, 4) - right).square().mean())

    before = error()
    assert distill_network(made, digits(), config) is made
    assert error() < 0.9 * before
    moved = {name for name, value in weights_of(made).items() if not value.equal(blocks[name])}
    assert bool(moved) == (weights == "all")
    with torch.no_grad():
        assert torch.equal(made(x, t, y), right) == (weights != "all")  # at full budget the original runs
    assert all(parameter.requires_grad for parameter in made.parameters())


def test_low_rank_changes_are_saved_beside_weights_that_stay(tmp_path):
    config = settings(tmp_path / "run", weights="lora", lora_rank=2, steps=5, mode="carry")
    made, (x, t, y) = student(config), some_inputs()
    names = set(made.elastic.low_rank)
    assert names == {f"blocks-{i}-{part}" for i in range(4) for part in (
        *("attention-qkv", "attention-proj"), *("mlp-fc1", "mlp-fc2"),
    )}  # fmt: skip
    distill_network(made, digits(), config)
    assert all(change.up.weight.abs().max() > 0 for change in made.elastic.low_rank.values())
    made.save_pretrained(tmp_path / "saved")
    again, plain = elit.load_elastic(tmp_path / "saved"), elit.load_model(tmp_path / "saved")
    with torch.no_grad():
        for kept in made.budgets:
            assert torch.equal(again(x, t, y, kept), made(x, t, y, kept))
        assert torch.equal(plain(x, t, y), network()(x, t, y))


def test_what_it_cannot_train_is_one_line(tmp_path):
    config = settings(tmp_path)
    with pytest.raises(ValueError, match="data: samples of shape"):
        distill_network(student(config), moving_digits(clips_per_digit=1), config)
    with pytest.raises(ValueError, match="student: a DiT; give a DiT of this library that elastify had"):
        distill_network(network(), digits(), config)
    capped = settings(tmp_path, weights="lora", budget_max=16)
    made = student(capped)
    with pytest.raises(ValueError, match="budget_max=16: at full budget the original runs; give at most 15"):
        distill_network(made, digits(), capped)


def test_the_command_takes_lora(tmp_path, capsys):
    network().save_pretrained(tmp_path / "model")
    words = ["elastify", str(tmp_path / "model"), str(tmp_path / "out"), "--write-after", "3", "--steps", "2"]
    assert main([*words, "--samples", "0", "--weights", "lora", "--lora-rank", "2"]) == 0
    assert "original: error 0" in capsys.readouterr().out  # the error of the original to itself
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    model = elit.load_elastic(tmp_path / "out")
    assert model.elastic_record.lora_rank == 2
    assert not model.elastic_record.changed
    assert main([*words, "--weights", "some", "--overwrite"]) == 2
    assert "weights must be any of lora, interface, all, got 'some'" in capsys.readouterr().err
