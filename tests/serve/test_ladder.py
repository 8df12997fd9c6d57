"""The time of a service's steps; its ladder of settings by rule and from a table, against comparing all with all."""

import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import yaml
from service import PRICES, PROFILE, row, saved_model

import elit
from elit.cli.main import main
from elit.evaluate.chunks import describe_network, recipe_digest
from elit.planner.cost import Costs
from elit.planner.profile import Profile
from elit.serve.ladder import find_ladder, fit_steps
from elit.serve.requests import read_request
from elit.serve.settings import ServiceSettings

SERVICE = ServiceSettings(model="digits")
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
    assert replace(COSTS, separate=True).step_ms([(FULL, 3)]) == 3 * COSTS.step_ms([(FULL, 1)])
    assert replace(COSTS, overlapping=True, call=100.0).step_ms([(FULL, 1)]) == 100.5
    assert replace(COSTS, separate=True).efficient_batch(FULL, 8) == 1
    assert replace(COSTS, call=1000.0).efficient_batch(FULL, 8) == 8
    prices = {"run": 1, "image": 3, "call": 2, "core": 0.5, "around": 4, "linear": 5, "attention": 6}
    anatomy = {"around": 1.5, "linear": 0.1, "square": 0.01, "shared": 0.25, "budgets": [1, 2, 3]}
    costs = Profile({}, {"prices": prices, "overlapping": False}, [], 0, anatomy).costs()
    assert costs == Costs(run=1, call=2, core=0.5, around=6, linear=0.5, square=0.06, image=3, shared=1)


@pytest.mark.parametrize(("separate", "overlapping"), [(False, False), (True, False), (False, True)])
def test_costs_that_were_wrong_are_found_by_the_steps_that_run(separate, overlapping):
    """Measured ten times too high and of another shape; what did not run has its share of the others' change."""
    truth, draw = replace(COSTS, separate=separate, core=0.0 if separate else 0.5), random.Random(0)
    truth = replace(truth, overlapping=overlapping, call=20.0 if overlapping else 2.0)
    wrong = replace(truth, call=90.0 if overlapping else 5.0, around=90.0, linear=20.0, square=0.5, image=7.0)

    def steps(budgets):
        for _ in range(200):
            running = [(replace(FULL, budget=draw.choice(budgets)), 1) for _ in range(draw.randint(1, 4))]
            yield running, truth.step_ms(running) * draw.uniform(0.9, 1.1)

    costs = fit_steps(fit_steps(wrong, steps([1, 4, 8, 16]), 0.1), steps([1, 4, 8, 16]))
    for budget in range(1, 17):
        each = [(replace(FULL, budget=budget), 2)]
        assert costs.step_ms(each) == pytest.approx(truth.step_ms(each), rel=0.1)
    assert (costs.image, costs.separate) == (7.0, separate)
    alone = fit_steps(wrong, steps([16]), 0.1)
    assert alone.step_ms([(FULL, 4)]) == pytest.approx(truth.step_ms([(FULL, 4)]), rel=0.1)


def test_the_ladder_rises_from_the_floor_to_all():
    service = replace(SERVICE, steps=8, least_budget="4", least_steps=5)
    rungs = [(rung.steps, rung.budget) for rung in service.ladder(range(1, 17))]
    budgets = [budget for _, budget in rungs]
    assert budgets == sorted(budgets)
    assert (budgets[0], budgets[-1]) == (4, 16)
    assert [steps for steps, budget in rungs if budget == 4] == [5, 6, 7, 8]
    (only,) = replace(SERVICE, steps=8, least_steps=8).ladder(())
    assert (only.steps, only.budget) == (8, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("ladder") / "digits")


@pytest.fixture(scope="module")
def model(folder):
    return elit.load_model(folder)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))


@pytest.fixture
def table(folder):
    plain = (4, 2, 30), (4, 6, 10), (4, 12, 11), (2, 6, 12), (2, 12, 9.5), (1, 6, 50), (1, 12, 45)
    rows = [*(row(*each) for each in plain), row("2@0-0.5,4@0.5-1", 6, 1.0), row(4, 8, 20, "cfg", 1.5)]
    rows += [row(count, 8, 6.0 + count, "ccfg", 2.0, weak=1) for count in (1, 2, 4)]
    path = folder / "sweep.jsonl"
    write_rows(path, rows)
    yield path
    path.unlink()


def rungs(plans):
    return tuple((plan.steps, plan.budget) for plan in plans)


def test_the_ladder_is_the_front_where_saving_is_worth_it(model, folder, table):
    curves = {4: ((2, 6, 12), (30, 10, 11)), 2: ((6, 12), (12, 9.5)), 1: ((6, 12), (50, 45))}
    scored = []
    for count, (steps, values) in curves.items():
        for each in range(steps[0], steps[-1] + 1):
            fd = np.interp(np.log(each), np.log(steps), values)
            scored.append((each * elit.count_flops(model, budget=count), fd, (each, count)))
    front = [
        (cost, rung)
        for cost, fd, rung in scored
        if not any(other <= cost and better <= fd and (other, better) != (cost, fd) for other, better, _ in scored)
    ]
    fds = {rung: fd for _, fd, rung in scored}
    kept = [max(front)]
    for cost, rung in sorted(front, reverse=True):
        above, better = kept[-1]
        if cost <= 0.9 * above and fds[rung] / fds[better] <= (above / cost) ** 2:
            kept.append((cost, rung))
    assert 2 < len(kept) < len(front)
    plans, line = find_ladder(model, folder, SERVICE)
    assert rungs(plans) == tuple(rung for _, rung in reversed(kept))
    assert [plan.quality for plan in plans] == pytest.approx([fds[rung] for _, rung in reversed(kept)])
    assert line == f"{len(kept)} settings, the best by fd for their FLOPs in {table}"


@pytest.fixture
def profiled(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(
        json.dumps(PROFILE | {"cost": {"prices": dict.fromkeys(PRICES, 0) | {"call": 1}, "overlapping": False}})
    )
    return replace(SERVICE, profile=path)


def test_a_profile_gives_the_ladder_its_times(model, folder, table, profiled):
    plans, line = find_ladder(model, folder, profiled)
    assert {plan.budget for plan in plans if plan.steps <= 6} == {4}
    assert "the best by fd for their time" in line


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"least_steps": 10, "least_budget": "50%"}, ((10, 2), (12, 2))),
        ({"least_budget": "100%", "least_steps": 5}, ((5, 4), (6, 4))),
        ({"most_steps": 40, "guidance_scale": 2.0, "guidance_budget": "1"}, ()),  # one latent is best there
        *(({"guidance_scale": scale}, ()) for scale in (1.5, 3.0)),  # a single setting, and none
    ],
)
def test_the_services_guidance_and_floor(model, folder, table, changes, wanted):
    assert rungs(find_ladder(model, folder, replace(SERVICE, **changes))[0]) == wanted


def test_only_a_table_of_this_network(model, folder, table):
    rows = [row(4, steps, 30.0 - steps, digest="another") for steps in (2, 6)]
    write_rows(table, rows)
    with pytest.raises(ValueError, match="made for another network; make it again with elit sweep"):
        find_ladder(model, folder, SERVICE)
    beside = table.rename(folder.parent / "sweep.jsonl")
    assert find_ladder(model, folder, SERVICE) == ([], "")
    digest = {"model_sha256": recipe_digest(describe_network(model))}
    write_rows(beside, [each | digest for each in rows])
    assert f" in {beside}" in find_ladder(model, folder, SERVICE)[1]
    beside.rename(table)


def test_requests_and_files_have_the_ladder(model):
    service = replace(SERVICE, steps=12, rungs=[[2, 4], [6, 4], [12, 2]])
    assert ServiceSettings(**yaml.safe_load(yaml.safe_dump(service.options()))) == service
    about = {"guidance_scale": 1.0, "budgets": model.budgets, "guides": True, "size": [8, 8], "multiple": 0}
    about |= {"text": False, "classes": 10, "class_names": [], "negative_prompt": False}
    for more, rungs in (
        ({}, [(2, 4), (6, 4), (12, 2)]),
        ({"quality": "high"}, [(12, 2)]),
        ({"quality": "medium"}, [(6, 4), (12, 2)]),
        ({"quality": "low"}, [(2, 4), (6, 4)]),
        ({"num_inference_steps": 20, "n": None}, [(20, 2), (20, 4)]),  # from the cheapest
    ):
        request = read_request(json.dumps({"prompt": "3"} | more).encode(), service, about, 0.0)
        assert [(rung.steps, rung.budget) for rung in request.settings] == rungs
        assert request.at(request.first) == request.least


def test_the_command_says_which_ladder(folder, table, tmp_path, capsys):
    assert main(["serve", str(folder), "--ladder", "--build", str(tmp_path / "app.yaml")]) == 0
    said = capsys.readouterr().err
    assert re.match(f"elit serve: \\d+ settings, the best by fd for their FLOPs in {table}", said)
    assert re.search(r"^  12 steps.* 2.*: [\d.e-]+ GFLOPs, fd 9\.5$", said, re.MULTILINE)
    options = yaml.safe_load((tmp_path / "app.yaml").read_text())["applications"][0]["args"]
    assert (options["steps"], options["rungs"][0]) == (12, [2, 4])
