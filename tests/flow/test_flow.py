"""Guidance as an operator on callables, and solvers against the closed form on Gaussian data."""

from itertools import pairwise

import pytest
import torch

from elit.flow.guidance import AG, CCFG, CFG, Branch, branches, guided_velocity, make_guidance
from elit.flow.path import flow_matching_loss, interpolate, logit_normal, shift_time, target_velocity
from elit.flow.solver import euler, heun, solve, time_grid

BUDGETS = tuple(range(1, 17))


def field(branch: Branch) -> torch.Tensor:
    return torch.tensor([10.0 * (not branch.drop_class) + branch.budget])


def guided(guidance, t=0.5, budget=16):
    plan = branches(guidance, t, budget, BUDGETS)
    return guided_velocity([field(branch) for branch in plan], guidance.scale if guidance else 1.0)


@pytest.mark.parametrize(
    ("guidance", "weak"),
    [(CFG(3.0), Branch(True, 16)), (AG(3.0, 4), Branch(False, 4)), (CCFG(3.0, 4), Branch(True, 4))],
)
def test_the_operator(guidance, weak):
    main = field(Branch(False, 16))
    assert branches(guidance, 0.5, 16, BUDGETS) == [Branch(False, 16), weak]
    assert torch.allclose(guided(guidance), 3 * main - 2 * field(weak))


def test_interval_and_scale_one():
    for off in (CFG(1.0), AG(1.0, 2), CCFG(1.0, 2)):
        assert branches(off, 0.5, 16, BUDGETS) == branches(None, 0.5, 16, BUDGETS)
    guidance = CFG(2.0, interval=(0.2, 0.7))
    assert [len(branches(guidance, t, 16, BUDGETS)) for t in (0.1, 0.2, 0.5, 0.7, 0.8)] == [1, 2, 2, 2, 1]
    assert len(branches(CFG(2.0, interval=(1 - 0.7, 1.0)), 0.3, 16, BUDGETS)) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CFG(-1.0), "guidance scale must be at least 0, got -1.0"),
        (lambda: CFG(2.0, interval=(0.0, 1.2)), "guidance interval"),
        (lambda: guided(AG(2.0, 8), budget=4), "guidance_budget must be at most the main branch's 4 for ag, got 8"),
        (lambda: guided(CCFG(2.0, 17)), "budget must be .*, got 17"),
        (lambda: branches(CCFG(2.0, 1), 0.5, None, ()), "guidance must be cfg for a model without a latent interface"),
    ],
)
def test_bad_guidance_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_guidance_by_name_is_that_of_the_function():
    assert make_guidance("none", 2.0) is None
    assert make_guidance("cfg", 2.0, 1, (0.2, 0.8)) == CFG(2.0, interval=(0.2, 0.8))
    assert make_guidance("ag", 2.0, "4") == AG(2.0, 4)
    assert make_guidance("ccfg", 2.0, "25%") == CCFG(2.0, 0.25)
    with pytest.raises(ValueError, match="guidance must be one of none, cfg, ag, ccfg, got 'pag'"):
        make_guidance("pag", 2.0)


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
