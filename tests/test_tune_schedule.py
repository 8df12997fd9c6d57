"""Tuned schedules: the search against all schedules there are, and a network from end to end."""

import itertools
import random
import sys
from pathlib import Path

import pytest
import torch
from conftest import conditions, opened

import elit
from elit.budgets import schedule_budgets

sys.path.append(str(Path(__file__).parents[1] / "studies"))
from tune_schedule import best_schedule, schedule_text, tune_schedule


@pytest.mark.parametrize("seed", range(10))
def test_the_search_is_as_good_as_trying_all_monotone_schedules(seed):
    draw = random.Random(seed)
    parts, budgets = draw.randint(1, 5), draw.randint(2, 5)
    costs = sorted(draw.sample(range(1, 30), budgets))
    lost = [[draw.random() for _ in costs] for _ in range(parts)]
    most = draw.uniform(costs[0], costs[-1]) * parts

    def total(chosen):
        return sum(lost[i][k] for i, k in enumerate(chosen))

    every = [
        chosen
        for chosen in itertools.product(range(budgets), repeat=parts)
        if list(chosen) in (sorted(chosen), sorted(chosen, reverse=True)) and sum(costs[k] for k in chosen) <= most
    ]
    found = best_schedule(lost, costs, most)
    assert tuple(found) in every
    assert total(found) == pytest.approx(min(map(total, every)))


def test_a_schedule_reads_back_as_what_it_was():
    assert schedule_text([4, 4, 4, 4]) == "4"
    assert schedule_text([1, 1, 8, 16]) == "1@0-0.5,8@0.5-0.75,16@0.75-1"
    parts = [1, 2, 2, 5, 5, 5, 9, 16]
    times = [i / 16 for i in range(16)]
    assert schedule_budgets(schedule_text(parts), times, range(1, 17)) == [kept for kept in parts for _ in range(2)]


def test_a_network_is_tuned_by_its_own_loss():
    model = opened("elit-dit")
    x, y = torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(0)), conditions(model, 6)
    found = tune_schedule(model, x, y, mean_share=0.5, bins=2, draws=1)
    assert len(found.budgets) == 2
    assert found.share <= 0.5
    assert schedule_budgets(found.schedule, [0.0, 0.5], model.budgets) == list(found.budgets)
    assert found.constant == 8
    assert len(found.table) == 2 * 16
    same = tune_schedule(model, x, y, mean_gflops=elit.count_flops(model, budget=8) / 1e9, bins=2, draws=1)
    assert same.gflops <= elit.count_flops(model, budget=8) / 1e9 + 1e-12


@pytest.mark.parametrize(
    ("kind", "bound", "says"),
    [
        ("dit", {"mean_share": 0.5}, "no latent interface"),
        ("elit-dit", {"mean_share": 0.01}, "the least is 0.0625"),
    ],
)
def test_what_cannot_be_tuned_is_said(kind, bound, says):
    model = opened(kind)
    with pytest.raises(ValueError, match=says):
        tune_schedule(model, torch.randn(4, 4, 16, 16), conditions(model, 4), **bound)
