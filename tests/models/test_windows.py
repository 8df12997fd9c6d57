"""Windows of grids that they do not divide: how they are cut, and networks that run on them."""

from collections import Counter
from itertools import product
from math import prod

import pytest
import torch
from conftest import inputs, opened
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import elit
from elit.models.interface import LatentInterface
from elit.models.layers import patchify, unpatchify
from elit.models.windows import Windows

SIZES = {"elit-dit": (22, 14), "elit-uvit": (10, 24), "elit-hdit": (22, 14), "elit-dit-video": (3, 10, 6)}


def cut(length: int, side: int) -> list[range]:
    """An axis in the fewest parts of at most `side`, as equal as possible."""
    parts = -(-length // side)
    return [range(part * length // parts, (part + 1) * length // parts) for part in range(parts)]


CUTS = [*product([(83, 83), (21, 58), (8, 5), (1, 52), (3, 7)], [(8, 8), (2, 4), (3, 8)]), ((21, 6, 5), (2, 4, 4))]


@pytest.mark.parametrize(("grid", "window"), CUTS)
def test_axes_are_cut_as_equally_as_possible(grid, window):
    """Against a plain loop over the windows."""
    boxes = list(product(*(cut(length, side) for length, side in zip(grid, window, strict=True))))
    boxes.sort(key=lambda box: (-prod(map(len, box)), *map(len, box)))
    windows = Windows(grid, window)
    assert windows.coordinates().tolist() == [list(place) for box in boxes for place in product(*box)]
    assert dict(windows.shapes) == Counter(tuple(map(len, box)) for box in boxes)
    raster = torch.tensor(list(product(*map(range, grid))), dtype=torch.float32)
    assert torch.equal(windows.coordinates(), raster[windows.order])
    assert torch.equal(raster[windows.order][windows.inverse], raster)


def test_a_smaller_window_keeps_the_same_share_and_at_least_one():
    assert [Windows((7, 7), (8, 8)).latents(kept)[0] for kept in (64, 32, 16, 1)] == [49, 25, 12, 1]
    assert [Windows((2, 3), (4, 4), 4).latents(kept)[0] for kept in (16, 8, 4)] == [8, 4, 4]


def test_unpatchify_undoes_patchify_on_any_grid():
    x, windows = torch.randn(2, 3, 22, 14), Windows((11, 7), (4, 4))
    assert torch.equal(unpatchify(patchify(x, (2, 2), windows), (2, 2), windows), x)


@pytest.mark.parametrize("kept", [6, 3, 1])
def test_read_and_write_are_those_of_each_window_alone(kept):
    torch.manual_seed(0)
    grid, window = (5, 7), (2, 3)
    interface = LatentInterface(32, 4, window, 6, condition_width=32).double()
    for parameter in interface.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    windows = Windows(grid, window)
    image, c = torch.randn(2, *grid, 32).double(), torch.randn(2, 32).double()
    tokens = image.flatten(1, 2)[:, windows.order]
    latents = interface.read(tokens, c, windows, kept)
    written = interface.write(tokens, latents, windows, kept)
    place, slot = interface.position.view(*window, 32), 0
    before = 0
    for rows, columns in sorted(product(cut(5, 2), cut(7, 3)), key=lambda box: -len(box[0]) * len(box[1])):
        box = image[:, rows.start : rows.stop, columns.start : columns.stop].flatten(1, 2)
        position = place[: len(rows), : len(columns)].flatten(0, 1)
        count = max(1, round(kept * box.shape[1] / 6))
        alone = interface.reader(interface.latents[:count], box + position, c)
        torch.testing.assert_close(latents[:, slot : slot + count], alone)
        back = interface.writer(box, position, alone)
        torch.testing.assert_close(written[:, before : before + box.shape[1]], back)
        slot, before = slot + count, before + box.shape[1]
    assert (slot, before) == (latents.shape[1], 35)


@pytest.mark.parametrize("kind", SIZES)
def test_a_trained_network_runs_at_sizes_that_do_not_divide(kind):
    model = opened(kind)
    x, t, y = inputs(model)
    x = torch.randn(2, x.shape[1], *SIZES[kind])
    t, y = t[:2], y[:2]
    low = model.budgets[0]
    with torch.no_grad():
        right = model(x, t, y)
        assert right.shape == x.shape
        assert not torch.equal(model(x, t, y, low), right)
    for budget in (None, low):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(x[:1], t[:1], y[:1], budget)
        assert counter.get_total_flops() == elit.count_flops(model, sample_size=SIZES[kind], budget=budget)
    with torch.no_grad():
        model.latent_interface.latents[low:] = torch.nan
        assert model(x, t, y, low).isfinite().all()


def test_samples_at_a_size_that_does_not_divide():
    model = opened("elit-dit")
    settings = {"steps": 2, "sample_size": (18, 22), "guidance": elit.CCFG(2.0, 1)}
    both = elit.sample(model, [1, 2], budget=0.5, **settings)
    assert both.shape == (2, 4, 18, 22)
    assert torch.allclose(elit.sample(model, [1], budget=0.5, **settings), both[:1], atol=1e-5)
    assert elit.create_model("ELIT-DiT-S/2", sample_size=36, depth=3).spec.window == (5, 5)
