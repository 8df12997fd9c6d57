"""Steps of a run that evaluate the network: TeaCache's rule, what it saves, and guidance and budgets beside it."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import ELIT, conditions, opened
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from elit.flow.guidance import AG, CCFG, CFG
from elit.flow.solver import time_grid
from elit.planner.choose import Plan
from elit.sampling.evaluations import reused_steps, sampling_flops, sampling_plan, time_changes
from elit.sampling.sample import sample
from elit.sampling.settings import Sampling

pytestmark = pytest.mark.slow

STEPS = 12


def asked(model, threshold, **settings):
    plan = sampling_plan(model, Sampling(steps=STEPS, cache=threshold, **settings))
    return [bool(chosen) for step in plan for chosen in step.values()]


TIMES = time_grid(STEPS)


def test_the_rule_by_hand():
    changes = [0.3, 0.3, 0.5, 0.1, 0.1, 0.1]
    # 0.3 and 0.6 stay below 1, 1.1 does not; then 0.1 and 0.2 do; the last step always asks.
    assert reused_steps(changes, [1] * 7, 1.0) == [False, True, True, False, True, True, False]
    assert reused_steps(changes, [1] * 7, 0.0) == [False] * 7
    assert reused_steps(changes, [2, 2, 1, 1, 1, 1, 1], 9.0) == [False, True, False, True, True, True, False]


def test_changes_are_those_of_the_time_embedding():
    model = opened("elit-dit")
    with torch.no_grad():
        at = [model.conditioning.time(torch.tensor([t])) for t in TIMES]
    expected = [((b - a).abs().sum() / a.abs().sum()).item() for a, b in pairwise(at)]
    assert time_changes(model, TIMES) == pytest.approx(expected, rel=1e-5)


def test_a_reused_step_has_the_velocity_of_the_last_evaluation():
    model = opened("elit-dit")
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    x, held = noise, None
    for step, ask in enumerate(asked(model, 2.5)):
        if ask:
            with torch.no_grad():
                held = model(x, torch.tensor([TIMES[step]]), torch.tensor([1]))
        x = x + (TIMES[step + 1] - TIMES[step]) * held
    torch.testing.assert_close(sample(model, [1], steps=STEPS, cache=2.5, noise=noise), x, rtol=0, atol=1e-5)


COUNTED = [
    {},
    {"guidance": CFG(2.0, interval=(0.0, 0.3)), "solver": "heun"},
    {"guidance": CCFG(2.0, 0.25), "cache": 2.5},
    {"guidance": AG(2.0, 0.25)},
    {"guidance": AG(2.0, 0.25), "cache": 2.5},
    {"step_budgets": [0.25, 0.5, 1.0]},
    {"sample_budgets": [1.0, 0.25], "guidance": CCFG(2.0, 0.25)},
]


@pytest.mark.parametrize("kind", ELIT)
def test_flops_are_those_of_the_evaluations(kind):
    """Autoguidance with one head for both branches, and steps that ask nothing, counted by torch; for a sample."""
    model = opened(kind).requires_grad_(False)  # the counter follows modules by the graph of gradients
    for each in COUNTED:
        settings, count, cache = {"steps": 3} | each, len(each.get("sample_budgets", [0])), "cache" in each
        y = conditions(model, count)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            sample(model, y, **settings)
        with FlopCounterMode(display=False) as times:  # the rule looks at the time embeddings once
            time_changes(model, time_grid(3)[:-1]) if cache else None
        expected = count * sampling_flops(model, **settings)
        tolerance = 0.005 if kind == "elit-sit" else 0  # its queries are the same for both branches, and computed once
        assert counter.get_total_flops() - times.get_total_flops() == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("change", [{}, {"steps": 5}, {"sample_budgets": (8, 4)}, {"solver": "heun", "cache": 0}])
def test_what_is_given_by_name_takes_the_place_of_a_plan(change):
    model, plan = opened("elit-dit"), Plan(steps=6, budget=0.5, guidance=CCFG(2.0, 1), cache=0.5)
    changed = replace(plan, **({"budget": None} if "sample_budgets" in change else {}) | change)
    assert torch.equal(sample(model, [0, 1], plan=plan, **change), sample(model, [0, 1], changed))
    by_hand = sample(model, [0, 1], steps=6, budget=0.5, guidance=CCFG(2.0, 1), cache=0.5)
    assert torch.equal(by_hand, sample(model, [0, 1], plan))
