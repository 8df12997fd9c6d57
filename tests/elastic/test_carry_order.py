"""The order of a window's places, and where tokens lie."""

import pytest
import torch

import elit
from elit.elastic.token_order import coarse_to_fine, make_plan, spread_to_window
from elit.models.layers import grid_positions

CPU = torch.device("cpu")


@pytest.mark.parametrize("window", [(1, 1), (4, 4), (8, 8), (3, 5), (2, 4, 4), (1, 6)])
def test_every_prefix_covers_the_window_evenly(window):
    order = coarse_to_fine(window)
    places = grid_positions(window, window, CPU)
    assert sorted(order) == list(range(len(places)))
    sides = torch.tensor(window, dtype=torch.float32)
    for kept in range(2, len(order) + 1):
        apart = (places[list(order[:kept])][:, None] - places).abs()
        reach = torch.minimum(apart, sides - apart).square().sum(-1).sqrt()  # on the torus
        hole = reach.min(0).values.max()  # the place farthest from what is carried
        among = reach[:, list(order[:kept])] + torch.diag(torch.full((kept,), torch.inf))
        assert among.min() >= hole - 1e-5  # carried ones keep at least that distance: none is wasted


def test_the_order_is_bit_reversal_where_sides_are_powers_of_two():
    coordinates = [divmod(place, 8) for place in coarse_to_fine((8, 8))]
    for level, kept in ((2, 4), (4, 16)):  # 2×2, then 4×4 places, equally far apart
        step = 8 // level
        assert {(row % step, column % step) for row, column in coordinates[:kept]} == {(0, 0)}


def test_dropped_places_take_the_mean_of_their_nearest():
    spread = spread_to_window((1, 4), 2)  # carries places 2 and 0
    assert coarse_to_fine((1, 4))[:2] == (2, 0)
    assert torch.equal(spread, torch.tensor([[0, 1], [0.5, 0.5], [1, 0], [1, 0]]))
    assert torch.equal(spread_to_window((4, 4), 16)[list(coarse_to_fine((4, 4)))], torch.eye(16))


@pytest.mark.parametrize("kept", [1, 5, 16])
def test_a_plan_finds_its_way_there_and_back(kept):
    grids = ((8, 4), (4, 4))  # two pictures, one behind the other
    plan = make_plan(grids, (4, 4), kept, CPU)
    tokens = torch.arange(48)
    assert torch.equal(tokens[plan.grouped][plan.ungrouped], tokens)
    grouped = tokens[plan.grouped].view(3, 16)
    assert grouped[2].min() == 32
    carried = grouped[:, plan.slots].flatten()
    assert torch.equal(carried[plan.to_core], tokens[plan.carried])
    assert torch.equal(tokens[plan.carried][plan.from_core], carried)
    assert torch.equal(plan.carried, plan.carried.sort().values)
    assert plan.full == (kept == 16)


def test_a_grid_that_does_not_divide_names_those_that_do():
    with pytest.raises(ValueError, match=r"sample_size=\(8, 6\).*nearest valid: 8 × 4 or 8"):
        make_plan(((8, 6),), (4, 4), 1, CPU)


@pytest.mark.parametrize("value", [0, 1.5, "much", [4, 2.0], "0.5@0-0.4", True])
def test_what_cannot_be_a_budget_is_said_at_once(value):
    with pytest.raises(ValueError, match="budget"), elit.budget(value):
        pass
    with pytest.raises(ValueError, match="budget"), elit.budget(1, guidance=value):
        pass
