"""The order of a window's places, and where tokens lie."""

import pytest
import torch

import elit
from elit.elastic.interface import coarse_to_fine, kept_tokens, spread_to_window
from elit.models.windows import Windows

CPU = torch.device("cpu")


@pytest.mark.parametrize("window", [(1, 1), (4, 4), (8, 8), (3, 5), (2, 4, 4), (1, 6)])
def test_every_prefix_covers_the_window_evenly(window):
    order = coarse_to_fine(window)
    places = Windows(window, window).raster.float()
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


@pytest.mark.parametrize("kept", [(1, 1), (5, 5), (16, 16), (16, 4)])
def test_a_plan_finds_its_way_there_and_back(kept):
    grids = ((8, 7), (4, 4))  # two pictures, one behind the other; the first has windows of 4×4 and 4×3
    plan = kept_tokens(grids, (4, 4), kept, CPU)
    tokens = torch.arange(72)
    sorted_tokens = tokens[plan.order]
    assert torch.equal(sorted_tokens[plan.inverse], tokens)
    core = tokens[plan.kept]
    assert torch.equal(core, core.sort().values)
    latents, carried = core[plan.from_core], []
    assert torch.equal(latents[plan.to_core], core)
    assert [grid.budget for grid in plan.grids] == list(kept)
    for grid, of_grid in zip(plan.grids, sorted_tokens.split(plan.tokens), strict=True):
        groups = grid.windows.groups(of_grid[None, :, None])
        for (shape, _), slots, windows in zip(grid.windows.shapes, grid.slots, groups, strict=True):
            assert len(slots) == max(1, round(grid.budget / 16 * shape[0] * shape[1]))
            carried.append(windows[:, slots].flatten())
    assert torch.equal(torch.cat(carried), latents)
    assert plan.full == (kept == (16, 16))


@pytest.mark.parametrize("value", [0, 1.5, "much", [4, 2.0], "0.5@0-0.4"])
def test_what_cannot_be_a_budget_is_said_at_once(value):
    with pytest.raises(ValueError, match="budget"), elit.budget(value):
        pass
    with pytest.raises(ValueError, match="budget"), elit.budget(1, guidance=value):
        pass
