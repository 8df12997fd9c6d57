"""The time of a service's steps, and its ladder of settings."""

from dataclasses import replace

import pytest

import elit
from elit.planner.cost import Costs
from elit.planner.profile import Profile, read_profile
from elit.serve.ladder import ladder_by_rule, qualities
from elit.serve.settings import ServiceSettings

COSTS = Costs(call=2.0, core=0.5, around=6.0, linear=0.5, image=3.0)
FULL = elit.Sampling(steps=4, budget=16)


def test_a_step_is_the_sum_of_its_parts():
    guided = elit.Sampling(steps=4, budget=8, guidance=elit.CCFG(2.0, 1))
    assert COSTS.step_ms([(FULL, 1)]) == 2 + 0.5 + 6 + 8
    assert COSTS.step_ms([(FULL, 2)]) == 2 + 0.5 + 2 * 14
    # Budgets 16, 8 and 1 are three cores; guidance is a second branch.
    assert COSTS.step_ms([(FULL, 1), (guided, 1)]) == 2 + 3 * 0.5 + 14 + (6 + 4) + (6 + 0.5)
    assert COSTS.step_ms([]) == 0
    assert COSTS.alone_ms(FULL, 2) == 4 * COSTS.step_ms([(FULL, 2)]) + 2 * 3
    assert COSTS.rate(FULL, 1) == pytest.approx(1e3 / COSTS.alone_ms(FULL))


def test_separate_forwards_add_up_and_overlapping_ones_hide_calls():
    assert replace(COSTS, separate=True).step_ms([(FULL, 3)]) == 3 * COSTS.step_ms([(FULL, 1)])
    assert replace(COSTS, overlapping=True, call=100.0).step_ms([(FULL, 1)]) == 100.5


def test_more_images_in_progress_only_where_they_pay():
    assert replace(COSTS, separate=True).efficient_batch(FULL, 8) == 1
    assert replace(COSTS, call=1000.0).efficient_batch(FULL, 8) == 8


def test_the_ladder_rises_from_the_floor_to_all():
    rungs = ladder_by_rule(range(1, 17), steps=8, least=4, least_steps=5)
    budgets = [budget for _, budget in rungs]
    assert budgets == sorted(budgets)
    assert (budgets[0], budgets[-1]) == (4, 16)
    assert [steps for steps, budget in rungs if budget == 4] == [5, 6, 7, 8]
    assert ladder_by_rule((), steps=8) == ((8, None),)
    with pytest.raises(ValueError, match="least_budget must be at most 16, got 17"):
        ladder_by_rule(range(1, 17), steps=8, least=17)
    with pytest.raises(ValueError, match="least_steps must be 1 to 8, got 9"):
        ladder_by_rule(range(1, 17), steps=8, least_steps=9)


def test_qualities_are_parts_of_the_ladder():
    ladder = ServiceSettings(model="digits", steps=8).ladder(range(1, 17))
    accepted = qualities(ladder)
    assert accepted["high"] == (ladder[-1:], len(ladder) - 1)
    assert accepted["auto"] == (ladder, 0)
    assert accepted["low"][0][-1] == accepted["medium"][0][0]


def test_costs_come_from_a_profile(tmp_path):
    prices = {"run": 1, "image": 3, "call": 2, "core": 0.5, "around": 4, "linear": 5, "attention": 6}
    anatomy = {"around": 1.5, "linear": 0.1, "square": 0.01, "shared": 0.25, "budgets": [1, 2, 3]}
    profile = Profile({}, {"prices": prices, "overlapping": False}, [], 0, anatomy)
    assert profile.costs() == Costs(run=1, call=2, core=0.5, around=6, linear=0.5, square=0.06, image=3, shared=1)
    (tmp_path / "p.json").write_text('{"cost": 1}')
    with pytest.raises(ValueError, match="damaged"):
        read_profile(tmp_path / "p.json")
    with pytest.raises(ValueError, match="No such file"):
        read_profile(tmp_path / "q.json")
    with pytest.raises(ValueError, match="call must be milliseconds, 0 or more, got -1"):
        Costs(call=-1, around=1)
