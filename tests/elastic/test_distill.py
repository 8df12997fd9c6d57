"""Distillation: low budgets come closer to the original, and only what was asked for is trained."""

import re
import sys

import pytest
import torch
from torch import nn

import elit
from elit.cli.main import main
from elit.data.digits import digits, moving_digits
from elit.elastic.distill import distill
from elit.elastic.lora import Adapters
from elit.elastic.runtime import original

pytestmark = pytest.mark.slow

SMALL = {"sample_size": 8, "in_channels": 1, "num_classes": 10, "hidden_size": 24, "num_heads": 2, "depth": 4}
ADAPTED = r"blocks\.\d\.(attention\.(qkv|proj)|mlp\.fc[12])\.weight"
SETTINGS = {"batch_size": 16, "learning_rate": 3e-3, "distillation": 1000.0, "say": str}


def network():
    torch.manual_seed(0)
    made = elit.create_model("DiT-S/1", **SMALL)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def elastic(mode="learned"):
    return elit.elastify(network(), read_after=1, write_after=3, window=(4, 4), mode=mode)


def some_inputs():
    data = digits()
    return data.images[:32], torch.linspace(0, 1, 32), data.labels[:32]


def weights_of(student):
    return {name: value.clone() for name, value in student.named_parameters() if not name.startswith("elastic.")}


@pytest.mark.parametrize("weights", ["all", "lora", "interface"])
def test_brings_low_budgets_closer(weights):
    student, (x, t, y) = elastic(), some_inputs()
    blocks = weights_of(student)
    with torch.no_grad(), original():
        right = student(x, t, y)

    def error():
        with torch.no_grad():
            return float((student(x, t, y, 4) - right).square().mean())

    before = error()
    assert distill(student, digits(), steps=30, weights=weights, **SETTINGS) is student
    assert error() < 0.9 * before
    moved = {name for name, value in weights_of(student).items() if not value.equal(blocks[name])}
    if weights == "lora":
        assert moved == {name for name in blocks if re.fullmatch(ADAPTED, name)}
    else:
        assert bool(moved) == (weights == "all")
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_lora_is_in_the_weights_and_saved_bit_for_bit(tmp_path, monkeypatch):
    student, (x, t, y) = elastic("carry"), some_inputs()
    before, fresh = weights_of(student), elastic("carry")
    distill(student, digits(), steps=5, weights="lora", lora_rank=2, **SETTINGS)
    assert student.state_dict().keys() == fresh.state_dict().keys()
    for name, value in weights_of(student).items():
        if re.fullmatch(ADAPTED, name):
            assert torch.linalg.matrix_rank(value - before[name], rtol=1e-3) == 2, name
    student.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="no file named"):  # these weights are no model without the interface
        elit.load_model(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)  # only training needs it
    again = elit.load_elastic(tmp_path)
    with torch.no_grad():
        for kept in student.budgets:
            assert torch.equal(again(x, t, y, kept), student(x, t, y, kept))


def test_the_teacher_is_the_original_while_adapters_hang_on_it():
    student, (x, t, y) = elastic("carry"), some_inputs()
    before = weights_of(student)
    with torch.no_grad():
        right = network()(x, t, y)
        adapters = Adapters(student, rank=2, seed=0)
        for parameter in adapters.parameters():
            parameter.normal_()
        assert not torch.allclose(student(x, t, y), right, atol=0.1)
        with adapters.off():
            assert torch.equal(student(x, t, y), right)
        adapted = student(x, t, y, 4)
        now = {name.replace(".base_layer.", "."): value for name, value in student.named_parameters()}
        assert all(torch.equal(now[name], value) for name, value in before.items())  # until they are merged
        adapters.merge()
        assert torch.allclose(student(x, t, y, 4), adapted, atol=1e-4)
    assert {type(module) for module in student.modules() if isinstance(module, nn.Linear)} == {nn.Linear}


def test_what_it_cannot_train_is_one_line(monkeypatch):
    student = elastic()
    for changes, said in (
        ({"data": moving_digits(clips_per_digit=1)}, "data: samples of shape"),
        ({"weights": "some"}, "weights='some': give all, lora, interface"),
        ({"weights": "lora", "lora_rank": 0}, "lora_rank=0: give at least 1"),
        ({"student": network()}, "student: a DiT; give a DiT of this library that elastify had"),
    ):
        given = {"student": student, "data": digits(), "steps": 1} | changes
        with pytest.raises(ValueError, match=said):
            distill(given.pop("student"), given.pop("data"), **given)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"needs peft \(.*\); pip install 'elit-diffusion\[lora\]'"):
        distill(student, digits(), steps=1, weights="lora")


def test_the_command_takes_lora(tmp_path, capsys):
    network().save_pretrained(tmp_path / "model")
    words = ["elastify", str(tmp_path / "model"), str(tmp_path / "out"), "--write-after", "3", "--steps", "2"]
    assert main([*words, "--samples", "0", "--weights", "lora", "--lora-rank", "2"]) == 0
    assert "original: error 0" in capsys.readouterr().out  # the error of the original to itself
    model = elit.load_elastic(tmp_path / "out")
    assert model.elastic_record.changed
    assert all("lora" not in name for name in model.state_dict())
    assert main([*words, "--weights", "some"]) == 2
    assert "weights='some': give all, lora, interface" in capsys.readouterr().err
