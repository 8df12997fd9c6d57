"""One loader for networks with and without an elastified core, and one budget for each."""

import pytest
import torch
from conftest import inputs, opened

import elit
from elit.models.saved import save_model


def elastified(dtype: torch.dtype = torch.float32):
    model = opened("dit").to(dtype)
    return elit.elastify(model, read_after=1, write_after=3, window=(4, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_model_keeps_the_dial_and_the_dtype(tmp_path, dtype):
    model = elastified(dtype)
    model.save_pretrained(tmp_path / "elastic")
    save_model(opened("elit-dit").to(dtype), tmp_path / "own")
    loaded, own = elit.load_model(tmp_path / "elastic"), elit.load_model(tmp_path / "own")
    assert loaded.budgets == model.budgets
    assert {weight.dtype for weight in loaded.parameters()} == {weight.dtype for weight in own.parameters()} == {dtype}
    x, t, y = inputs(model)
    with torch.no_grad():
        for budget in (16, 3):
            assert torch.equal(loaded(x.to(dtype), t, y, budget), model(x.to(dtype), t, y, budget))
    assert elit.load_model(tmp_path / "elastic", torch_dtype=torch.float16).dtype == torch.float16
    assert elit.load_model(tmp_path / "own", torch_dtype=None).dtype == dtype


@pytest.mark.parametrize("kind", ["elit-dit", "elit-sit", "elit-mmdit", "dit"])
def test_the_block_of_elastified_networks_is_refused_by_others(kind):
    model = opened(kind)
    x, t, y = inputs(model)
    for call in (lambda: model(x, t, y), lambda: elit.sample(model, y, steps=1)):
        with pytest.raises(ValueError, match=r"cannot use elit\.budget here"), elit.budget(1):
            call()
    model(x, t, y)


def test_an_elastified_network_is_not_told_twice():
    model = elastified()
    x, t, y = inputs(model)
    with torch.no_grad(), elit.budget(1):
        assert model(x, t, y).shape == x.shape
        for call in (lambda: model(x, t, y, 4), lambda: elit.sample(model, y, steps=1)):
            with pytest.raises(ValueError, match=r"cannot take a budget inside elit\.budget"):
                call()
