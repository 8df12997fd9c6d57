"""Where the controls stand: checked, and as settings and links."""

from urllib.parse import parse_qsl

import pytest

import elit
from elit.play.dial import CONTROLS, Dial, default_dial, pieces_of

COUNTS = range(1, 17)
DIAL = Dial(condition="3", budgets=(4, 16, 8))


def test_settings_are_those_of_sample():
    settings = DIAL.settings(takes_text=False)
    assert (settings.labels, settings.count, settings.budget, settings.steps) == (("3",), 1, "4", 16)
    pieces = Dial(condition="a boat", pieces=2, budgets=(4, 16, 16), knots=(0.5, 0.8), guidance="ccfg", scale=2)
    settings = pieces.settings(takes_text=True)
    assert (settings.prompts, settings.budget) == (("a boat",), "4@0-0.5,16@0.5-1")
    assert settings.guide() == elit.CCFG(2, 1)
    assert Dial(condition="3").settings(takes_text=False).budget == "full"  # a baseline


@pytest.mark.parametrize(
    "dial",
    [
        DIAL,
        Dial(condition="a ☂ & b=c", budgets=(5, 5, 5), seed=7, steps=3, guidance="cfg", scale=3.5),
        Dial(condition="3", pieces=3, budgets=(1, 8, 16), knots=(0.25, 0.5), guidance="ag", guidance_budget=2),
    ],
)
def test_a_link_says_where_the_dial_stands(dial):
    said = DIAL.from_query(dict(parse_qsl(dial.query())), COUNTS)
    assert said.settings(takes_text=True) == dial.settings(takes_text=True)
    assert Dial.from_controls(dial.controls()) == dial
    assert len(dial.controls()) == len(CONTROLS)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"seed": "x"}, "seed='x': give a number"),
        ({"seed": "-1"}, "seed=-1: give 0 to"),
        ({"seed": "1e400"}, "seed=1e400"),
        ({"steps": "9999"}, "steps=9999: give 1 to 250"),
        ({"steps": "2.5"}, "steps=2.5: give a whole number"),
        ({"scale": "nan"}, "scale=nan"),
        ({"guidance": "../x"}, r"guidance='\.\./x'"),
        ({"budget": "17"}, "got 17"),
        ({"budget": "4@0-0.5"}, "budget must cover t"),
        ({"budget": "1@0-0.1,2@0.1-0.2,3@0.2-0.3,4@0.3-1"}, "at most 3 pieces"),
        ({"of": " "}, "nothing to draw"),
        ({"of": "a" * 3000}, "a prompt of 3000 characters"),
    ],
)
def test_a_wrong_link_is_one_line(query, message):
    with pytest.raises(ValueError, match=message):
        DIAL.from_query(query, COUNTS)


def test_knots_rise_and_budgets_become_pieces():
    with pytest.raises(ValueError, match=r"knots at t = 0\.8, 0\.3"):
        Dial(condition="3", pieces=3, budgets=(1, 2, 3), knots=(0.8, 0.3))
    assert pieces_of("50%", COUNTS) == {"pieces": 1, "budgets": (8, 8, 8)}
    assert pieces_of("50%@0-0.4,100%@0.4-1", COUNTS) == {"pieces": 2, "budgets": (8, 16, 16), "knots": (0.4, 0.67)}
    start = default_dial({"condition": "bag"}, COUNTS)
    assert (start.condition, start.budget) == ("bag", "16")
