"""Optimizers and schedules, against torch's own steps on each weight and closed forms; resumed to the bit."""

import json
import math
import re
import shutil

import pytest
import torch
from conftest import fresh
from test_loop import equal, losses, tiny, weights

from elit.config import DistillConfig, TrainConfig
from elit.models.layers import weight_groups
from elit.training.loop import make_optimizers, optimizer_step
from elit.training.train import train

STEPS, RATE, DECAY = 3, 0.01, 0.1


@pytest.mark.parametrize("kind", ["elit-dit", "elit-mmdit", "elit-uvit"])
def test_what_decays_and_what_muon_moves(kind):
    network = fresh(kind)
    names = {weight: name for name, weight in network.named_parameters()}
    groups = weight_groups(network, network.blocks, "muon")
    muon, adamw, plain = ([names[each] for each in groups[name]] for name in ("muon", "adamw", "adamw without decay"))
    assert sorted(muon + adamw + plain) == sorted(names.values())
    assert all(name.startswith("blocks.") and name.endswith("weight") for name in muon)
    assert {"patch_embed.weight", "latent_interface.reader.attention.q.weight"} <= {*adamw}
    assert {"latent_interface.latents", "latent_interface.position", "patch_embed.bias"} <= {*plain}
    assert all(re.search(r"norm|bias$|\.(label|embedding)\.weight$|\.(latents|position|null)$", name) for name in plain)
    assert not any("norm" in name for name in muon + adamw)
    assert list(weight_groups(network, network.blocks, "adam")) == ["adam"]


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "muon"])
def test_steps_are_torchs_own_on_each_weight(optimizer):
    ours, theirs = fresh("elit-dit"), fresh("elit-dit")
    config = TrainConfig(optimizer=optimizer, learning_rate=RATE, weight_decay=DECAY, betas=(0.8, 0.9))
    optimizers, own = make_optimizers(config, ours, ours.blocks), {}
    for name, weight in theirs.named_parameters():
        decays = optimizer != "adam" and name.endswith("weight") and weight.ndim == 2 and "label" not in name
        if optimizer == "muon" and decays and name.startswith("blocks"):
            own[name] = torch.optim.Muon([weight], RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
        else:
            own[name] = torch.optim.AdamW([weight], RATE, (0.8, 0.9), weight_decay=DECAY if decays else 0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        if step == 1:
            before = {name: value.clone() for name, value in ours.state_dict().items()}
            optimizer_step(optimizers, RATE, torch.tensor(torch.nan))
            assert equal(before, ours.state_dict())
            continue
        optimizer_step(optimizers, RATE, torch.tensor(1.0))
        for each in own.values():
            each.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


def test_schedules_in_closed_form():
    settings = {"steps": 100, "learning_rate": 2.0, "warmup_steps": 10}
    constant = TrainConfig(**settings)
    assert [constant.learning_rate_at(step) for step in (0, 4, 9, 50, 99)] == [0.2, 1.0, 2.0, 2.0, 2.0]
    cosine = TrainConfig(**settings, schedule="cosine")
    for step in (0, 9, 10, 40, 55, 99):
        expected = 1 + math.cos(math.pi * max(0, step - 10) / 90)
        assert cosine.learning_rate_at(step) == pytest.approx(expected * min(1, (step + 1) / 10))
    linear = TrainConfig(**settings, schedule="linear", decay_share=0.25)
    assert [linear.learning_rate_at(step) for step in (20, 75, 80, 99)] == pytest.approx([2, 2, 1.6, 0.08])
    distil = DistillConfig(steps=7, learning_rate=3.0, warmup_steps=0)
    assert [distil.learning_rate_at(step) for step in range(7)] == [3.0 * (1 - step / 7) for step in range(7)]


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "schedule"), [("adam", "constant"), ("adamw", "linear")])
def test_resumes_to_the_bit(tmp_path, optimizer, schedule):
    out, settings = tmp_path / "run", {"optimizer": optimizer, "schedule": schedule, "checkpoint_every": 3}
    train(tiny(out, **settings))
    whole, trained = losses(out), weights(out)
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    shutil.rmtree(out / "model")
    train(tiny(out, resume=True, **settings))
    assert losses(out) == whole
    assert equal(weights(out), trained)


@pytest.mark.slow
def test_a_resumed_run_goes_by_the_config_of_now(tmp_path):
    out, settings = tmp_path / "run", {"steps": 6, "optimizer": "muon", "schedule": "cosine", "checkpoint_every": 3}
    train(tiny(out, **settings))
    whole, line = losses(out), (out / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(line)["lr"] == tiny(out, **settings).learning_rate_at(5)
    with pytest.raises(ValueError, match="optimizer 'muon' → 'adam' cannot change within a run"):
        train(tiny(out, resume=True, **settings | {"optimizer": "adam", "steps": 7}))
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    train(tiny(out, resume=True, **settings | {"weight_decay": 0.9}))
    assert losses(out)[:4] == whole[:4]
    assert losses(out)[4:] != whole[4:]
