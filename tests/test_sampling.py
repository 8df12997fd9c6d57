"""Sampling with real networks: guidance identities, schedules, seeds."""

import pytest
import torch
from conftest import opened

import elit
from elit.flow.solver import time_grid
from elit.sampling import sample, sampling_flops, seeded_noise

STEPS = 4


def test_scale_one_is_bit_equal_to_no_guidance(elit_model):
    plain = sample(elit_model, [0, 1], steps=STEPS, budget=3)
    for guidance in (elit.CFG(1.0), elit.AG(1.0, 1), elit.CCFG(1.0, 1)):
        assert torch.equal(sample(elit_model, [0, 1], steps=STEPS, budget=3, guidance=guidance), plain)


def test_ag_at_its_own_budget_is_no_guidance(elit_model):
    plain = sample(elit_model, [0, 1], steps=STEPS, budget=3)
    guided = sample(elit_model, [0, 1], steps=STEPS, budget=3, guidance=elit.AG(4.0, 3))
    assert torch.allclose(guided, plain, atol=1e-4)


def test_ccfg_at_the_main_budget_is_cfg(elit_model):
    settings = {"steps": STEPS, "budget": 3}
    cfg = sample(elit_model, [0, 1], guidance=elit.CFG(2.0), **settings)
    assert torch.equal(sample(elit_model, [0, 1], guidance=elit.CCFG(2.0, 3), **settings), cfg)
    assert not torch.allclose(sample(elit_model, [0, 1], guidance=elit.CCFG(2.0, 1), **settings), cfg, atol=1e-3)


@pytest.mark.parametrize("guidance", [None, elit.CFG(2.0), elit.AG(2.0, 1), elit.CCFG(2.0, 1)])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_against_a_loop_of_single_calls(guidance, solver):
    """Branches one at a time, one sample at a time, the equations written out."""
    model = opened("elit-dit")
    out = sample(model, [1, 2], steps=STEPS, budget=8, guidance=guidance, solver=solver, seed=5)
    times = time_grid(STEPS)
    for i, label in enumerate((1, 2)):
        x = seeded_noise([5 + i], (4, 16, 16))

        def velocity(x, t, label=label):
            y, null = torch.tensor([label]), torch.tensor([model.config.num_classes])
            with torch.no_grad():
                main = model(x, torch.tensor([t]), y, 8)
                if guidance is None:
                    return main
                weak_y, weak_budget = {"cfg": (null, 8), "ag": (y, 1), "ccfg": (null, 1)}[guidance.kind]
                return 2 * main - model(x, torch.tensor([t]), weak_y, weak_budget)

        for k in range(STEPS):
            dt, v = times[k + 1] - times[k], velocity(x, times[k])
            if solver == "heun" and k < STEPS - 1:
                v = (v + velocity(x + dt * v, times[k + 1])) / 2
            x = x + dt * v
        assert torch.allclose(out[i : i + 1], x, atol=1e-4)


@pytest.mark.parametrize("constant", [[3] * STEPS, lambda t: 3, "3@0-0.5,3@0.5-1"])
def test_a_constant_schedule_is_bit_equal_to_that_budget(elit_model, constant):
    plain = sample(elit_model, [0, 1], steps=STEPS, budget=3)
    assert torch.equal(sample(elit_model, [0, 1], steps=STEPS, budget=constant), plain)


def test_a_schedule_changes_the_budget_on_the_way():
    model = opened("elit-dit")
    seen = []
    read = model.latent_interface.read
    model.latent_interface.read = lambda s, c, kept: seen.append(kept) or read(s, c, kept)
    sample(model, [0], steps=STEPS, budget="0.5@0-0.5,1@0.5-1")
    assert seen == [8, 8, 16, 16]


@pytest.mark.parametrize("guidance", [None, elit.CCFG(2.0, 1)])
def test_a_sample_does_not_depend_on_its_batch(any_model, guidance):
    if guidance is not None and not any_model.budgets:
        guidance = elit.CFG(2.0)
    y = [i % 5 for i in range(8)]
    settings = {"steps": STEPS, "guidance": guidance, "seed": 7}
    whole = sample(any_model, y, **settings)
    for batch_size in (2, 1):
        assert torch.allclose(sample(any_model, y, batch_size=batch_size, **settings), whole, atol=1e-5)
    third = sample(any_model, y[3], **settings | {"seed": 10})
    assert torch.allclose(third, whole[3:4], atol=1e-5)
    chosen = sample(any_model, [y[6], y[1]], **settings | {"seed": [13, 8]})
    assert torch.allclose(chosen, whole[[6, 1]], atol=1e-5)


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
