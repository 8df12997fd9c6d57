"""What a step takes, and the ladder of settings."""

from dataclasses import replace

import pytest

from elit.serve.costs import Costs, Setting, costs_of_profile, efficient_batch, ladder, read_costs

COSTS = Costs(call=2.0, core=0.5, around=6.0, linear=0.5, image=3.0)


def test_a_step_is_the_sum_of_its_parts():
    full, guided = Setting(steps=4, budget=16), Setting(steps=4, budget=8, weak_budget=1, guided=True)
    assert COSTS.step_ms([(full, 1)]) == 2 + 0.5 + 6 + 8
    assert COSTS.step_ms([(full, 2)]) == 2 + 0.5 + 2 * 14
    # Budgets 16, 8 and 1 are three cores; guidance is a second branch.
    assert COSTS.step_ms([(full, 1), (guided, 1)]) == 2 + 3 * 0.5 + 14 + (6 + 4) + (6 + 0.5)
    assert COSTS.step_ms([]) == 0
    assert COSTS.alone_ms(full, 2) == 4 * COSTS.step_ms([(full, 2)]) + 2 * 3
    assert COSTS.rate(full, 1) == pytest.approx(1e3 / COSTS.alone_ms(full))


def test_separate_forwards_add_up_and_overlapping_ones_hide_calls():
    full = Setting(steps=4, budget=16)
    assert replace(COSTS, separate=True).step_ms([(full, 3)]) == 3 * COSTS.step_ms([(full, 1)])
    assert replace(COSTS, overlapping=True, call=100.0).step_ms([(full, 1)]) == 100.5
    assert COSTS.scaled(2).step_ms([(full, 1)]) == 2 * COSTS.step_ms([(full, 1)])


def test_more_images_in_progress_only_where_they_pay():
    full = Setting(steps=4, budget=16)
    assert efficient_batch(replace(COSTS, separate=True), full, 8) == 1
    assert efficient_batch(replace(COSTS, call=1000.0), full, 8) == 8


def test_ladder_rises_from_the_floor_to_all():
    rungs = ladder(range(1, 17), steps=8, least=4, least_steps=5)
    budgets = [rung.budget for rung in rungs]
    assert budgets == sorted(budgets)
    assert (budgets[0], budgets[-1]) == (4, 16)
    assert [rung.steps for rung in rungs if rung.budget == 4] == [5, 6, 7, 8]
    assert ladder((), steps=8) == (Setting(steps=8),)
    with pytest.raises(ValueError, match="least_budget=17: give at most 16"):
        ladder(range(1, 17), steps=8, least=17)
    with pytest.raises(ValueError, match="least_steps=9: give 1 to 8"):
        ladder(range(1, 17), steps=8, least_steps=9)


def test_costs_come_from_a_profile(tmp_path):
    prices = {"run": 1, "image": 3, "call": 2, "core": 0.5, "around": 4, "linear": 5, "attention": 6}
    anatomy = {"around": 1.5, "linear": 0.1, "square": 0.01, "budgets": [1, 2, 3]}
    costs = costs_of_profile({"cost": {"prices": prices, "overlapping": False}, "anatomy": anatomy})
    assert costs == Costs(call=2, core=0.5, around=6, linear=0.5, square=0.06, image=3)
    (tmp_path / "p.json").write_text('{"cost": 1}')
    with pytest.raises(ValueError, match="damaged, or of an older version"):
        read_costs(tmp_path / "p.json")
    with pytest.raises(ValueError, match="no such file"):
        read_costs(tmp_path / "q.json")
    with pytest.raises(ValueError, match="call=-1"):
        Costs(call=-1, around=1)
