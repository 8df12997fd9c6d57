"""Closed-form cost against torch's counter and against the paper (section 5)."""

import pytest
import torch
from conftest import SETTINGS, inputs, opened
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import elit
from elit.flops import count_flops


@pytest.mark.parametrize("kind", list(SETTINGS))
@pytest.mark.parametrize("scale", [1, 2])
def test_equals_the_flop_counter(kind, scale):
    model = opened(kind)
    size = tuple(scale * length for length in model.sample_size)
    for budget in model.budgets or (None,):
        # The math backend: the counter does not see the CPU's flash kernel.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(*inputs(model, batch=1, size=size), budget)
        assert count_flops(model, sample_size=size, budget=budget) == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "sample_size", "budget", "paper", "tolerance"),
    [
        ("DiT-XL/2", 32, None, 182, 0.015),
        ("ELIT-DiT-XL/2", 32, None, 188, 0.015),
        ("DiT-XL/2", 64, None, 806, 0.015),
        ("ELIT-DiT-XL/2", 64, None, 831, 0.015),
        ("ELIT-DiT-XL/2", 64, 0.25, 386, 0.03),
    ],
)
def test_training_tflops_of_the_paper(name, sample_size, budget, paper, tolerance):
    """Training = 3 × forward × batch 256."""
    ours = 3 * 256 * count_flops(name, sample_size=sample_size, budget=budget) / 1e12
    assert ours == pytest.approx(paper, rel=tolerance)


@pytest.mark.parametrize(("sample_size", "low", "paper"), [(32, 1, 190), (64, 4, 804)])
def test_multi_budget_training_tflops_of_the_paper(sample_size, low, paper):
    """Batch 384, mean over the budgets drawn."""
    budgets = range(low, (sample_size // 8) ** 2 + 1)
    costs = [count_flops("ELIT-DiT-XL/2", sample_size=sample_size, budget=budget) for budget in budgets]
    assert 3 * 384 * sum(costs) / len(costs) / 1e12 == pytest.approx(paper, rel=0.025)


@pytest.mark.parametrize(("name", "paper"), [("DiT-XL/2", 675e6), ("ELIT-DiT-XL/2", 698e6)])
def test_parameters_of_the_paper(name, paper):
    """Counted on the meta device: nothing is allocated."""
    with torch.device("meta"):
        model = elit.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(paper, rel=0.01)


def test_cost_falls_with_the_budget():
    costs = [count_flops("ELIT-DiT-B/2", budget=budget) for budget in range(1, 17)]
    assert costs == sorted(set(costs))


def test_a_name_takes_the_window_of_its_size_and_a_model_keeps_its_own():
    with torch.device("meta"):
        small = elit.create_model("ELIT-DiT-S/2")
    assert small.spec.window == (4, 4)
    assert count_flops(small, sample_size=64) != count_flops("ELIT-DiT-S/2", sample_size=64)
    with pytest.raises(ValueError, match="nearest valid"):
        count_flops(small, sample_size=36)
