"""The closed form against the networks themselves."""

import inspect

import pytest
import torch
from conftest import SETTINGS, fresh

import elit
from elit.costs.parameters import count_parameters
from elit.models.layout import KINDS
from elit.models.networks import NETWORKS
from elit.models.presets import model_config


@pytest.mark.parametrize("kind", list(SETTINGS))
def test_equals_the_network(kind):
    model = fresh(kind)
    assert count_parameters(model.kind, model.config) == sum(each.numel() for each in model.parameters())


@pytest.mark.parametrize("name", ["HDiT-S/4", "ELIT-HDiT-B/2", "ELIT-U-ViT-B/2", "ELIT-SiT-S/2", "MM-DiT-S/2"])
def test_equals_a_preset(name):
    with torch.device("meta"):
        model = elit.create_model(name, depth=12)
    assert count_parameters(*model_config(name, depth=12)) == sum(each.numel() for each in model.parameters())


@pytest.mark.parametrize("name", list(NETWORKS))
def test_defaults_are_the_constructors(name):
    """Presets know them without the classes."""
    parameters = inspect.signature(NETWORKS[name].__init__).parameters
    own = {key: each.default for key, each in parameters.items() if key not in ("self", "interface")}
    assert dict(KINDS[name].defaults) == own
    assert list(KINDS[name].defaults) == list(own)
    assert NETWORKS[name].kind is KINDS[name]
