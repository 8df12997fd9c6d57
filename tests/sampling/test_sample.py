"""Sampling with one network: schedules, resolutions, costs, refusals. What holds for all is in test_backbones.py."""

import pytest
import torch
from conftest import opened

import elit
from elit.sampling.sample import sample

STEPS = 4


@pytest.mark.parametrize("guidance", [None, elit.CFG(2.0), elit.CCFG(2.0, 1), elit.AG(2.0, 2), elit.AG(2.0, 3)])
@pytest.mark.parametrize("kind", ["elit-dit", "elit-uvit", "elit-mmdit", "elit-sit"])
def test_a_budget_a_sample_is_that_sample_alone(kind, guidance):
    model = opened(kind)
    budgets, settings = [16, 4, 4, 1.0, 0.5], {"steps": 2, "guidance": guidance}
    y = model.conditioning.example(5)
    mixed = sample(model, y, sample_budgets=budgets, batch_size=3, **settings)
    for i, budget in enumerate(budgets):
        alone = sample(model, y[i : i + 1], budget=budget, seed=i, **settings)
        torch.testing.assert_close(mixed[i : i + 1], alone, rtol=0, atol=1e-4)
    equal = sample(model, y, sample_budgets=[4] * 5, **settings)
    if guidance is None or guidance.drop_class:  # in autoguidance a batch of one budget shares its head
        assert torch.equal(equal, sample(model, y, budget=4, **settings))


def test_a_schedule_changes_the_budget_on_the_way():
    model = opened("elit-dit")
    seen = []
    read = model.latent_interface.read
    model.latent_interface.read = lambda s, c, windows, budget: seen.append(budget) or read(s, c, windows, budget)
    sample(model, [0], steps=STEPS, budget="50%@0-0.5,100%@0.5-1")
    assert seen == [8, 8, 16, 16]


def test_another_resolution_in_batches():
    seen = []
    settings = {"batch_size": 2, "progress": lambda done, total: seen.append((done, total))}
    assert sample(opened("elit-dit"), [0, 1, 2], steps=1, sample_size=(16, 24), **settings).shape == (3, 4, 16, 24)
    assert seen == [(2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": [16, 4]}, r"budget must be one budget, got \[16, 4\]"),
        ({"step_budgets": [16, 1, 1]}, "step_budgets must be one a step, got 3 for 2"),
        ({"sample_budgets": [16]}, "sample_budgets must be 2, one a sample, got 1"),
        ({"sample_budgets": [4] * 2, "step_budgets": [4] * 2}, "cannot take step_budgets and sample_budgets at once"),
        ({"sample_budgets": [4, 1], "guidance": elit.AG(2.0, 2)}, "guidance_budget must be at most .* 1 for ag"),
        ({"y": []}, "y must be at least one label"),
        ({"solver": "rk4"}, "solver must be one of euler, heun, got 'rk4'"),
        ({"seed": [1, 2, 3]}, "seeds must be 1, or 2, one a sample, got 3"),
        ({"noise": torch.randn(2, 3, 16, 16)}, r"noise must be of shape .*, got \(2, 3, 16, 16\)"),
        ({"noise": torch.zeros(2, 4, 16, 16), "seed": 3}, "cannot take noise with seed or sample_size"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, .* got 'int8'"),
        ({"cache": -0.1}, r"cache must be at least 0, got -0\.1"),
        ({"cache": 0.1, "solver": "heun"}, "cache=0.1 is not supported for 'heun'"),
        ({"guidance": elit.AG(2.0, 8), "budget": 8}, "guidance_budget must be below the main branch's for ag, got 8"),
        ({"guidance": elit.CFG(2.0, interval=(0.1, 0.2))}, "guidance interval must be around the t of a step"),
    ],
)
def test_bad_settings_are_named_in_one_line(settings, message):
    settings = {"y": [0, 1], "steps": 2} | settings
    with pytest.raises(ValueError, match=message) as error:
        sample(opened("elit-dit"), **settings)
    assert "\n" not in str(error.value)


def test_generators_as_seeds():
    model, seeded = opened("elit-dit"), lambda seed: torch.Generator().manual_seed(seed)
    plain = sample(model, [1, 2], steps=1, seed=[3, 9])
    assert torch.equal(sample(model, [1, 2], steps=1, seed=[seeded(3), seeded(9)]), plain)
    source = seeded(3)
    both = sample(model, [1, 2], steps=1, seed=source)
    torch.testing.assert_close(both[0], plain[0], rtol=0, atol=1e-5)
    assert not torch.equal(sample(model, [1], steps=1, seed=source), plain[:1])  # it goes on
