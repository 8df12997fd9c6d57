"""Layers against index loops and closed forms."""

import itertools
import math

import pytest
import torch

from elit.models.layers import Rope, grid_positions, patchify, rope_tables, rotate, token_grid, unpatchify

CASES = [
    ((8, 12), (2, 2), (2, 3)),
    ((4, 4), (1, 1), (4, 4)),
    ((4, 8, 8), (1, 2, 2), (2, 2, 4)),
    ((2, 4, 4), (2, 1, 2), (1, 2, 1)),
]


@pytest.mark.parametrize(("size", "patch", "window"), CASES)
def test_patchify_is_inverted_exactly(size, patch, window):
    x = torch.randn(2, 3, *size)
    tokens = patchify(x, patch, window)
    assert tokens.shape == (2, math.prod(size) // math.prod(patch), 3 * math.prod(patch))
    assert torch.equal(unpatchify(tokens, size, patch, window), x)


@pytest.mark.parametrize(("size", "patch", "window"), CASES)
def test_patchify_against_index_loops(size, patch, window):
    """Token by token: groups in raster order, windows in raster order inside, channels last."""
    x = torch.randn(1, 3, *size)
    groups = [length // (p * w) for length, p, w in zip(size, patch, window, strict=True)]
    expected = []
    for group in itertools.product(*map(range, groups)):
        for inside in itertools.product(*map(range, window)):
            corner = [(g * w + i) * p for g, w, i, p in zip(group, window, inside, patch, strict=True)]
            pixels = [
                x[(0, slice(None), *(c + o for c, o in zip(corner, offset, strict=True)))]
                for offset in itertools.product(*map(range, patch))
            ]
            expected.append(torch.cat(pixels))
    assert torch.equal(patchify(x, patch, window)[0], torch.stack(expected))


def test_a_group_is_a_view_of_its_tokens():
    """Group-major order: reshaping to (B·G, n, d) gives each window of the image."""
    x = torch.arange(16.0).view(1, 1, 4, 4)
    groups = patchify(x, (1, 1), (2, 2)).view(4, 4)
    assert groups.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_positions_follow_the_tokens():
    positions = grid_positions((4, 6), (2, 3), torch.device("cpu"))
    expected = [(r, c) for gr in (0, 2) for gc in (0, 3) for r in (gr, gr + 1) for c in range(gc, gc + 3)]
    assert positions.tolist() == [[float(r), float(c)] for r, c in expected]


@pytest.mark.parametrize("coordinates", [2, 3, 4])
def test_rope_depends_on_differences_alone(coordinates):
    """Products of rotated queries and keys do not change when all positions move together."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 5, 1, 24, generator=generator).double()
    positions = torch.randint(0, 9, (5, coordinates), generator=generator).float()

    def products(offset: float) -> torch.Tensor:
        rope = Rope(*(table.double() for table in rope_tables(positions + offset, 24)))
        return torch.einsum("blhd,bmhd->blm", rotate(q, rope), rotate(k, rope))

    assert torch.allclose(products(0), products(3), atol=1e-5)
    moved = rope_tables(positions + torch.eye(coordinates)[0] * torch.arange(5)[:, None], 24)
    assert not torch.allclose(products(0), torch.einsum("blhd,bmhd->blm", rotate(q, moved), rotate(k, moved)))


def test_rope_against_complex_rotation():
    positions = torch.tensor([[3.0, 5.0]])
    x = torch.randn(1, 1, 1, 8)
    rates = [1, 100**-0.5]
    angles = torch.tensor([3 * rate for rate in rates] + [5 * rate for rate in rates])
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(4), angles)
    expected = torch.cat((turned.real, turned.imag), -1)
    assert torch.allclose(rotate(x, rope_tables(positions, 8)), expected, atol=1e-6)


@pytest.mark.parametrize("coordinates", [2, 3, 4])
def test_every_coordinate_turns_something(coordinates):
    for axis in range(coordinates):
        positions = torch.zeros(2, coordinates)
        positions[1, axis] = 1
        cos, _ = rope_tables(positions, 2 * coordinates + 2)
        assert not torch.equal(cos[0], cos[1])


def test_token_grid_names_the_nearest_sizes():
    assert token_grid((16, 24), (2, 2), (4, 4)) == (8, 12)
    with pytest.raises(ValueError, match=r"sample_size=\(16, 20\).*multiples of 8×8; nearest valid: 16 × 16 or 24"):
        token_grid((16, 20), (2, 2), (4, 4))
    with pytest.raises(ValueError, match="nearest valid: 8 × 8"):
        token_grid((3, 8), (2, 2), (4, 4))
