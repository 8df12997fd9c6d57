"""The cost model: counts against the closed form, prices found again in made-up times, the file's guards."""

import json
import random

import pytest
import torch
from conftest import SETTINGS, opened

import elit
from elit.planner.cost import TERMS, Costs, anatomy, evaluations_of, fit, mean_error
from elit.planner.profile import Profile, case_row, grid, held_out, measure_profile, profile_recipe, read_profile
from elit.sampling.evaluations import sampling_flops

PRICES = {"run": 0.4, "image": 0.1, "call": 3.0, "core": 1.0, "around": 20.0, "linear": 35.0, "attention": 60.0}


@pytest.mark.parametrize("kind", SETTINGS)
def test_counted_gflops_are_the_closed_form(kind):
    model = opened(kind)
    parts = anatomy(model)
    costs = Costs(**{name: parts[name] for name in ("around", "linear", "square", "shared")})
    settings = [{"steps": 3}, {"steps": 4, "guidance": elit.CFG(2.0, interval=(0.3, 1.0))}]
    if model.budgets:
        least, most = model.budgets[0], model.budgets[-1]
        settings += [{"steps": 4, "budget": f"{least}@0-0.5,{most}@0.5-1", "guidance": elit.CCFG(2.0, least)}]
        settings += [{"steps": 9, "guidance": elit.AG(2.0, least), "cache": 0.5}]
    for chosen in settings:
        exact = sampling_flops(model, **chosen) / 1e9
        assert costs.run_ms(evaluations_of(model, elit.Sampling(**chosen)), 1) == pytest.approx(exact, rel=1e-9)


def runs_of(model, cases):
    return [(evaluations_of(model, sampling), batch) for sampling, batch in cases]


@pytest.mark.parametrize("overlapping", [False, True])
def test_prices_are_found_again_and_predict_what_was_not_fitted(overlapping):
    model = opened("elit-dit")
    parts = anatomy(model)
    truth = Costs.from_prices(PRICES, parts, overlapping=overlapping)
    known = grid(model.budgets, (1, 4, 16, 64))
    runs, noise = runs_of(model, known), random.Random(0)
    prices, found = fit(runs, [truth.run_ms(*run) * (1 + 0.02 * noise.gauss(0, 1)) for run in runs], parts)
    unknown = runs_of(model, held_out(model.budgets, (1, 64), known))
    assert found == overlapping
    costs = Costs.from_prices(prices, parts, overlapping=found)
    assert mean_error(costs, unknown, [truth.run_ms(*run) for run in unknown]) < 0.03
    assert min(prices.values()) >= 0


def test_held_out_runs_are_others_than_those_fitted():
    known = grid(range(1, 17), (1, 2, 4))
    assert {sampling.budget for sampling, _ in known} == {1, 5, 9, 12, 16}
    assert not set(known) & set(held_out(range(1, 17), (1, 2, 4), known))
    assert {case_row(case)["kind"] for case in grid((), (1,))} == {"none", "cfg"}
    assert all((elit.Sampling.from_dict(case_row(case)), case[1]) == case for case in known)


@pytest.mark.slow
def test_a_profile_is_measured_saved_and_read(tmp_path):
    model = opened("elit-dit")
    profile = measure_profile(model, batch_sizes=(1, 2), seconds=0)
    assert profile.rounds == 3
    assert all(row["ms"] > 0 for row in profile.rows)
    path = profile.save(tmp_path)
    assert read_profile(path, profile_recipe(model)) == profile


def test_a_profile_of_something_else_is_refused(tmp_path):
    model = opened("elit-dit")
    recipe = profile_recipe(model)
    cost, path = {"prices": dict.fromkeys(TERMS, 1.0), "overlapping": False}, tmp_path / "cut.json"
    for name, value, says in (
        ("model", "0" * 64, "made for another network"),
        ("device", "abacus", "made for device abacus, here it is"),
    ):
        with pytest.raises(ValueError, match=says):
            read_profile(Profile(recipe | {name: value}, cost, [], 3).save(tmp_path), recipe)
    path.write_text(json.dumps({"recipe": recipe}))
    with pytest.raises(ValueError, match="damaged"):
        read_profile(path, recipe)
    assert profile_recipe(model, torch.bfloat16)["dtype"] == "bfloat16"
