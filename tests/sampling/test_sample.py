"""Sampling with one network: schedules, resolutions, costs, refusals. What holds for all is in test_backbones.py."""

import pytest
import torch
from conftest import opened

import elit
from elit.sampling.evaluations import sampling_flops
from elit.sampling.sample import sample

STEPS = 4


@pytest.mark.parametrize("constant", [[3] * STEPS, lambda t: 3, "3@0-0.5,3@0.5-1"])
def test_a_constant_schedule_is_bit_equal_to_that_budget(constant):
    model = opened("elit-dit")
    plain = sample(model, [0, 1], steps=STEPS, budget=3)
    assert torch.equal(sample(model, [0, 1], steps=STEPS, budget=constant), plain)


def test_a_schedule_changes_the_budget_on_the_way():
    model = opened("elit-dit")
    seen = []
    read = model.latent_interface.read
    model.latent_interface.read = lambda s, c, kept: seen.append(kept) or read(s, c, kept)
    sample(model, [0], steps=STEPS, budget="0.5@0-0.5,1@0.5-1")
    assert seen == [8, 8, 16, 16]


def test_another_resolution():
    model = opened("elit-dit")
    assert sample(model, [0], steps=1, sample_size=32).shape == (1, 4, 32, 32)
    assert sample(model, [0], steps=1, sample_size=(16, 24)).shape == (1, 4, 16, 24)


def test_progress():
    seen = []
    sample(
        opened("elit-dit"), [0, 1, 2], steps=1, batch_size=2, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(2, 3), (3, 3)]


def test_sampling_flops_add_up_the_branches():
    model = opened("elit-dit")
    one = {budget: elit.count_flops(model, budget=budget) for budget in model.budgets}
    assert sampling_flops(model, steps=4, budget=8) == 4 * one[8]
    assert sampling_flops(model, steps=4, budget=8, guidance=elit.CCFG(2.0, 1)) == 4 * (one[8] + one[1])
    assert sampling_flops(model, steps=4, budget=8, guidance=elit.CFG(2.0, interval=(0, 0.3))) == 6 * one[8]
    assert sampling_flops(model, steps=4, solver="heun") == 7 * one[16]
    assert sampling_flops(model, steps=2, budget=[4, 16]) == one[4] + one[16]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"y": [5, 6]}, "y=6: labels are 0 to 4, and 5 for no class"),
        ({"y": []}, "y: no labels"),
        ({"steps": 0}, "steps=0"),
        ({"budget": 17}, "budget=17"),
        ({"budget": "x"}, "budget='x'"),
        ({"solver": "rk4"}, "solver='rk4'"),
        ({"sample_size": 20}, "nearest valid: 16 or 24"),
        ({"seed": [1, 2, 3]}, "3 seeds for 2 samples"),
        ({"noise": torch.randn(2, 3, 16, 16)}, r"noise: shape \(2, 3, 16, 16\)"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"guidance": elit.AG(2.0, 9), "budget": 8}, "above the main branch's 8"),
    ],
)
def test_bad_settings_are_named(settings, message):
    settings = {"y": [0, 1], "steps": 2} | settings
    with pytest.raises(ValueError, match=message):
        sample(opened("elit-dit"), **settings)
