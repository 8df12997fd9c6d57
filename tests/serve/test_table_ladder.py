"""A service's ladder from a sweep's table, against the front by comparing every setting with every other."""

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from service import saved_model

import elit
from elit.cli.main import main
from elit.planner.choose import network_digest
from elit.serve.requests import ImageRequest, make_job
from elit.serve.settings import ServiceSettings
from elit.serve.table_ladder import find_ladder

SERVICE = ServiceSettings(model="digits")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("ladder") / "digits")


@pytest.fixture(scope="module")
def model(folder):
    return elit.load_model(folder)


def row(budget, steps, fd, guidance="none", scale=1.0, weak=None, digest=""):
    setting = {"budget": str(budget), "steps": steps, "guidance": guidance, "scale": scale, "guidance_budget": weak}
    setting |= {"share": 1.0, "gflops": 1.0, "ms": 1.0, "saturation": 0.0, "recipe_sha256": "", "file": ""}
    return setting | {"count": 100, "detector": "digits", "model_sha256": digest, "fd": fd}


@pytest.fixture
def table(folder):
    """Four latents need no more than six steps, one is bad at any number of them; CCFG at one scale."""
    rows = [
        row(count, steps, fd) for count, steps, fd in ((4, 2, 30), (4, 6, 10), (4, 12, 11), (2, 6, 12), (2, 12, 9.5))
    ]
    rows += [row(1, 6, 50), row(1, 12, 45), row("2@0-0.5,4@0.5-1", 6, 1.0), row(4, 8, 20, "cfg", 1.5)]
    rows += [row(count, 8, 6.0 + count, "ccfg", 2.0, weak=1) for count in (1, 2, 4)]
    path = folder / "sweep.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    yield path
    path.unlink()


def test_the_ladder_is_the_front(model, folder, table):
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
    rungs, line = find_ladder(model, folder, SERVICE)
    assert rungs == tuple(rung for _, rung in sorted(front))
    assert (rungs[0], rungs[-1]) == ((2, 4), (12, 2))
    words = f"{len(front)} settings, the best by fd for their FLOPs in {table}: "
    assert line == words + "2 steps with 4 latents to 12 steps with 2 latents"


@pytest.mark.parametrize(
    ("changes", "rungs"),
    [
        ({"least_steps": 11, "least_budget": "50%"}, ((11, 2), (12, 2))),
        ({"least_budget": "100%", "least_steps": 5}, ((5, 4), (6, 4))),
        ({"most_steps": 20, "guidance_scale": 2.0, "guidance_budget": "1"}, ()),  # one latent is best there
        ({"guidance_scale": 1.5}, ()),  # a single setting
        ({"guidance_scale": 3.0}, ()),
        ({"least_steps": 13}, ()),
    ],
)
def test_the_services_guidance_and_floor(model, folder, table, changes, rungs):
    assert find_ladder(model, folder, replace(SERVICE, **changes))[0] == rungs


def test_only_a_table_of_this_network(model, folder, table):
    rows = [row(4, steps, 30.0 - steps, digest="another") for steps in (2, 6)]
    table.write_text("".join(json.dumps(each) + "\n" for each in rows))
    with pytest.raises(ValueError, match="made for another network; make it again with elit sweep"):
        find_ladder(model, folder, SERVICE)
    beside = table.rename(folder.parent / "sweep.jsonl")
    assert find_ladder(model, folder, SERVICE) == ((), "")
    beside.write_text("".join(json.dumps(each | {"model_sha256": network_digest(model)}) + "\n" for each in rows))
    assert f" in {beside}: " in find_ladder(model, folder, SERVICE)[1]
    beside.rename(table)


def test_requests_and_files_have_the_ladder(model, folder):
    service = replace(SERVICE, steps=12, rungs=[[2, 4], [6, 4], [12, 2]])
    again = ServiceSettings.from_dict(yaml.safe_load(yaml.safe_dump(service.to_dict())))
    assert again == service
    ladder = again.ladder(model.budgets)
    assert [(rung.steps, rung.budget) for rung in ladder] == [(2, 4), (6, 4), (12, 2)]
    about = {"guidance_scale": 1.0, "budgets": model.budgets, "guides": True, "size": [8, 8], "multiple": 0}
    about |= {"text": False, "classes": 10, "class_names": [], "negative_prompt": False}
    for asked, rungs in ((None, [(2, 4), (6, 4), (12, 2)]), ("high", [(12, 2)]), ("medium", [(6, 4), (12, 2)])):
        job = make_job(ImageRequest(prompt="3", quality=asked), again, about, 0.0)
        assert [(rung.steps, rung.budget) for rung in job.settings] == rungs
    job = make_job(ImageRequest(prompt="3", num_inference_steps=20), again, about, 0.0)
    assert [(rung.steps, rung.budget) for rung in job.settings] == [(20, 2), (20, 4)]  # from the cheapest
    with pytest.raises(ValueError, match=r"rungs must be a ladder whose last steps are steps=20"):
        replace(SERVICE, rungs=[(2, 4), (12, 2)])


def test_the_command_says_which_ladder(folder, table, tmp_path, capsys):
    out = tmp_path / "app.yaml"
    assert main(["serve", str(folder), "--build", str(out)]) == 0
    assert f"elit serve: 8 settings, the best by fd for their FLOPs in {table}" in capsys.readouterr().err
    options = yaml.safe_load(out.read_text())["applications"][0]["args"]
    assert options["steps"] == 12
    assert options["rungs"][0] == [2, 4]
    assert main(["serve", str(folder), "--steps", "12", "--build", str(out), "--overwrite"]) == 0
    assert capsys.readouterr().err == ""
    assert "rungs" not in yaml.safe_load(out.read_text())["applications"][0]["args"]
