"""Costs of a small network on a small machine, and the ladder that goes with them."""

import pytest

from elit.serve.costs import Costs, ladder


@pytest.fixture
def costs():
    return Costs(call=2.0, core=0.5, around=6.0, linear=0.5, image=3.0)


@pytest.fixture
def rungs():
    return ladder(range(1, 17), steps=8)
