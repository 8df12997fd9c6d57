"""1,000 draws of wrong and right arguments; `python tests/fuzz.py --draws 20000` for more."""

import inspect

import pytest
from fuzz import fuzz
from fuzzing.commands import lines, options
from fuzzing.functions import functions
from fuzzing.place import Place

import elit
from elit.cli.main import COMMANDS


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A place with networks alone: enough to list what is drawn."""
    place = Place.__new__(Place)
    place.fixtures = place.work = tmp_path_factory.mktemp("place")
    place.networks()
    place.detector = place.pictures = None
    return place


def test_every_public_function_is_drawn_with_every_argument(networks):
    known = functions(networks)
    assert set(elit.__all__) <= set(known)
    for name in elit.__all__:
        function = getattr(elit, name)
        drawn = {argument for label, (_, _, names) in known.items() for argument in names if label.split()[0] == name}
        arguments = inspect.signature(function.__init__ if inspect.isclass(function) else function).parameters.values()
        named = {each.name for each in arguments if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}
        assert not named - {"self"} - drawn, name


def test_every_command_is_drawn(networks):
    drawn = lines(networks)
    assert set(drawn) == set(COMMANDS)
    for name in COMMANDS:
        assert drawn[name]
        assert "json" in options(name)


@pytest.mark.slow
def test_nothing_that_is_handed_in_surprises(tmp_path):
    fuzz(1_000, tmp_path)
