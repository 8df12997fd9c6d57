"""On Gaussian data the velocity and the whole path are known in closed form."""

from itertools import pairwise

import pytest
import torch

from elit.flow.path import flow_matching_loss, interpolate, logit_normal, shift_time, target_velocity
from elit.flow.solver import euler, heun, solve, time_grid

MEAN, STD = 1.5, 0.3


def gaussian_velocity(x, t, step):
    """E[X1 − X0 | X_t = x] for data N(MEAN, STD²) and noise N(0, 1)."""
    variance = (1 - t) ** 2 + (t * STD) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


def error(solver, steps):
    x0 = torch.linspace(-2, 2, 9, dtype=torch.float64)
    exact = MEAN + STD * x0
    return (solve(solver(x0, time_grid(steps)), gaussian_velocity) - exact).abs().max().item()


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
def test_order_of_convergence(solver, order):
    errors = [error(solver, steps) for steps in (40, 80, 160, 320)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.1)


def test_time_grid_and_shift():
    assert time_grid(4) == [0, 0.25, 0.5, 0.75, 1]
    assert time_grid(4, 2.0) == pytest.approx([0, 1 / 7, 1 / 3, 3 / 5, 1])  # nearer to noise
    sigma = 1 - 0.3  # SD3's formula in the noise level
    assert shift_time(0.3, 2.0) == pytest.approx(1 - 2 * sigma / (1 + sigma))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        time_grid(0)


def test_path():
    x0, x1 = torch.randn(2, 3, 1, 4, 4)
    assert torch.equal(interpolate(x0, x1, torch.zeros(3)), x0)
    assert torch.equal(interpolate(x0, x1, torch.ones(3)), x1)
    half = interpolate(x0, x1, torch.tensor([0.25, 0.5, 0.75]))
    assert torch.allclose(half[1], (x0[1] + x1[1]) / 2)
    assert torch.allclose(half[0] + 0.75 * target_velocity(x0, x1)[0], x1[0], atol=1e-6)
    assert flow_matching_loss(x1 - x0, x0, x1).tolist() == [0] * len(x0)
    assert flow_matching_loss(x1 - x0 + 2, x0, x1).tolist() == pytest.approx([4] * len(x0))


def test_training_times_are_logit_normal():
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    t = logit_normal(normal)
    logit = (t / (1 - t)).log()
    assert logit.mean().item() == pytest.approx(0, abs=0.02)
    assert logit.std().item() == pytest.approx(1, abs=0.02)
    assert logit_normal(normal, 2.22).mean() < t.mean()
