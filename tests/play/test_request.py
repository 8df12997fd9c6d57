"""Requests: checked, as values of the controls, and as links."""

from dataclasses import replace
from urllib.parse import parse_qsl

import pytest

import elit
from elit.play.renderer import CONTROLS, Request, examples

BUDGETS = range(1, 17)
START = Request("3", elit.Sampling(steps=16, budget=16))


def request(condition="3", **changes):
    return Request(condition, replace(START.sampling, **changes))


@pytest.mark.parametrize(
    "wanted",
    [
        START,
        request("a ☂ & b=c", budget=5, seed=7, steps=3, guidance=elit.CFG(3.5)),
        request(budget="1@0-0.25,8@0.25-0.5,16@0.5-1", guidance=elit.AG(1.5, 2)),
        request(budget="4@0-0.5,16@0.5-1", guidance=elit.CCFG(2, 1)),
    ],
)
def test_links_and_controls_keep_a_request(wanted):
    assert START.updated(dict(parse_qsl(wanted.query()))) == wanted
    controls = wanted.controls(BUDGETS)
    assert len(controls) == len(CONTROLS)
    assert START.updated_by_controls(controls) == wanted
    guided = request(guidance=elit.CFG(4))
    assert guided.updated({"of": "3"}) == guided
    baseline = Request("3", elit.Sampling(steps=16))
    assert baseline.updated({"budget": "full", "steps": "16"}) == baseline
    assert baseline.updated_by_controls(baseline.controls(())) == baseline


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ({"seed": "x"}, "seed must be of type int, got 'x'"),
        ({"seed": "-1"}, "seed must be 0 to 2147483647, got -1"),
        ({"steps": "9999"}, "steps must be 1 to 64, got 9999"),
        ({"guidance": "cfg", "scale": "nan"}, "scale"),
        ({"guidance": "../x"}, r"guidance.*\.\./x"),
        ({"budget": "4@0-0.5"}, "cover t|budget"),
        ({"of": " "}, "the class or prompt must be a text"),
        ({"of": "a" * 3000}, "at most 2000 characters, got '3000"),
    ],
)
def test_an_invalid_link_is_one_line(link, message):
    with pytest.raises(ValueError, match=message):
        START.updated(link).controls(BUDGETS)


def test_examples_are_valid():
    for _, sampling in examples(START.sampling, (4, 8, 12, 16), ("cfg", "ag", "ccfg")):
        Request("3", sampling).controls((4, 8, 12, 16))
    assert len(examples(START.sampling, BUDGETS, ("cfg", "ccfg"))) == 5
    assert not examples(START.sampling, (), ("cfg",))
