"""Valid budgets, the training draw, and schedules."""

from collections import Counter

import numpy as np
import pytest

from elit.budgets import (
    draw_budget,
    equal_parts,
    evenly_spaced,
    format_budget,
    format_schedule,
    parse_budget,
    resolve_budget,
    saved_schedule,
    schedule_budgets,
    training_budgets,
)

SIXTEEN = tuple(range(1, 17))
FOURS = tuple(range(4, 17, 4))


@pytest.mark.parametrize(
    ("budget", "budgets", "expected"),
    [
        *((budget, SIXTEEN, 16) for budget in (None, 1.0, "1.0", "full")),
        *((budget, SIXTEEN, 8) for budget in (0.5, "0.5", "50%", np.int64(8))),
        *((budget, SIXTEEN, 1) for budget in (1, "1")),
        (0.28125, SIXTEEN, 5),  # 4.5 rounds up
        (np.float32(0.25), SIXTEEN, 4),
        (" 12.5 % ", SIXTEEN, 2),
        *((budget, FOURS, latents) for budget, latents in ((0.05, 4), (0.7, 12))),
        (None, (), None),
    ],
)
def test_valid_budgets(budget, budgets, expected):
    assert resolve_budget(budget, budgets) == expected


@pytest.mark.parametrize(
    ("budget", "budgets", "says"),
    [
        *((budget, SIXTEEN, "budget must be") for budget in (0, 17, -1, 0.0, 1.5, -0.5, float("nan"))),
        *((text, SIXTEEN, "budget must be") for text in ("x", "", "17", "1.5", "0%", "150%", "%", "8%%")),
        (6, FOURS, "4 to 16 in steps of 4"),
        *((budget, (), "no latent interface") for budget in (1.0, 4, "0.5")),
    ],
)
def test_an_invalid_budget_is_named(budget, budgets, says):
    with pytest.raises(ValueError, match=says):
        resolve_budget(budget, budgets)


@pytest.mark.parametrize("budget", [1, 8, 1.0, 0.5, 0.333, 1 / 16, None])
def test_what_is_formatted_parses_to_the_same(budget):
    parsed = parse_budget(format_budget(budget))
    assert type(parsed) is type(budget) or budget is None
    assert resolve_budget(parsed, SIXTEEN) == resolve_budget(budget, SIXTEEN)


def test_schedules_of_earlier_files_keep_their_meaning():
    """There a bare 1 beside decimal shares was all latents."""
    assert saved_schedule("0.5@0-0.5,1@0.5-1") == "50%@0-0.5,100%@0.5-1"
    for text in ("50%@0-0.5,1@0.5-1", "1@0-0.25,16@0.25-1", "4@0-0.5,100%@0.5-1"):
        assert saved_schedule(text) == format_schedule(text) == text
    assert format_schedule("0.5@0-0.5,1.0@0.5-1") == "50%@0-0.5,100%@0.5-1"


def test_draws_are_uniform_and_depend_on_seed_and_step():
    draws = [draw_budget(0, step, SIXTEEN) for step in range(16_000)]
    assert draws == [draw_budget(0, step, SIXTEEN) for step in range(16_000)]
    assert draws[:50] != [draw_budget(1, step, SIXTEEN) for step in range(50)]
    counts = Counter(draws)
    assert set(counts) == set(SIXTEEN)
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 38  # chi², 15 degrees of freedom, p = 0.001


def test_training_budgets_are_a_range_of_the_valid_ones():
    assert training_budgets(SIXTEEN, None, None) == SIXTEEN
    assert training_budgets(tuple(range(1, 65)), 4, None) == tuple(range(4, 65))
    assert training_budgets(SIXTEEN, 16, 16) == (16,)
    assert training_budgets((), None, None) == ()
    for low, high in ((0, 4), (5, 4), (1, 17)):
        with pytest.raises(ValueError, match=f"got {low} and {high}"):
            training_budgets(SIXTEEN, low, high)
    with pytest.raises(ValueError, match="no budget of this model lies between"):
        training_budgets(FOURS, 5, 7)
    with pytest.raises(ValueError, match="no latent interface"):
        training_budgets((), 1, None)


TIMES = [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (None, [16] * 4),
        ("0.5", [8] * 4),
        ([1, 0.5, None, 16], [1, 8, 16, 16]),
        (lambda t: 4 if t < 0.5 else 1.0, [4, 4, 16, 16]),
        ("50%@0-0.5,100%@0.5-1", [8, 8, 16, 16]),
        ("0.5@0-0.5,1.0@0.5-1", [8, 8, 16, 16]),
        ("50%@0-0.5,1@0.5-1", [8, 8, 1, 1]),  # a bare 1 is one latent, everywhere
        ("4@0-0.6,full@0.6-1", [4, 4, 4, 16]),
    ],
)
def test_schedules(schedule, expected):
    assert schedule_budgets(schedule, TIMES, SIXTEEN) == expected


def test_boundaries_belong_to_the_later_piece_and_parts_are_the_fewest():
    assert schedule_budgets("1@0-0.3,16@0.3-1", [0.2, 3 * 0.1], SIXTEEN) == [1, 16]
    assert [equal_parts(each) for each in ([16, 16, 1, 1], [4] * 6)] == [[16, 1], [4]]
    assert [evenly_spaced(SIXTEEN, count) for count in (4, 20, 1)] == [[1, 6, 11, 16], [*SIXTEEN], [1]]
    assert [equal_parts(each) for each in ([4, 1, 1, 4], [2] * 4 + [1] * 2)] == [[4, 1, 1, 4], [2, 2, 1]]


@pytest.mark.parametrize(
    "schedule",
    ["0.5@0-0.4,1.0@0.5-1", "0.5@0-0.5", "0.5@0.5-1,1@0-0.5", "0.5@0-1.5", "x@0-1", "0.5@0", "20@0-1", [8, 8]],
)
def test_a_bad_schedule_is_named(schedule):
    with pytest.raises(ValueError, match="budget"):
        schedule_budgets(schedule, TIMES, SIXTEEN)
