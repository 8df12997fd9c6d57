"""Every supported class: the original at full budget, sensible below it. `test_families.py` has the rest."""

import copy
import pickle

import pytest
import torch
from tiny import KINDS, build, inputs, open_branches, window

import elit

pytestmark = pytest.mark.slow


def pair(kind, **settings):
    """The original and the elastified."""
    original = build(kind)
    chosen = {"read_after": 1, "write_after": 3, "window": window(kind)} | settings
    return original, elit.elastify(copy.deepcopy(original), **chosen)


def run(model, x):
    return model(**x, return_dict=False)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_equals_the_original_at_full_budget_forward_and_gradient(kind, checkpointing):
    original, elastic = pair(kind)
    if checkpointing:
        elastic.enable_gradient_checkpointing()
    grads = []
    for model in (original, elastic):
        x = inputs(kind)
        x["hidden_states"].requires_grad_()
        output = run(model, x)
        output.square().sum().backward()
        weights = {name: p.grad for name, p in model.named_parameters() if not name.startswith("elastic.")}
        grads.append((output, x["hidden_states"].grad, weights))
    (output, grad, weights), (output2, grad2, weights2) = grads
    assert torch.equal(output, output2)
    assert (grad - grad2).abs().max() <= 1e-5 * max(1, grad.abs().max())
    for name, value in weights.items():
        if value is not None:
            assert (value - weights2[name]).abs().max() <= 1e-5 * max(1, value.abs().max()), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["carry", "learned"])
def test_every_budget_is_finite_and_the_dropped_do_not_matter(kind, mode):
    _, elastic = pair(kind, mode=mode)
    open_branches(elastic)
    x = inputs(kind, batch=1)
    assert elastic.budgets == tuple(range(1, 17))
    with torch.no_grad():
        for kept in elastic.budgets:
            with elit.budget(kept):
                assert run(elastic, x).isfinite().all()
        with elit.budget(5):
            right = run(elastic, x)
            elastic.elastic.latents[5:] = torch.nan
            assert torch.equal(run(elastic, x), right)


@pytest.mark.parametrize("kind", KINDS)
def test_stays_the_diffusers_model_that_it_was(kind):
    original, elastic = pair(kind)
    assert isinstance(elastic, type(original))
    assert type(elastic).__name__ == kind
    assert elastic.config == original.config
    assert (elastic.dtype, elastic.device) == (original.dtype, original.device)
    copies = [copy.deepcopy(elastic), pickle.loads(pickle.dumps(elastic))]
    x = inputs(kind)
    with torch.no_grad(), elit.budget(0.5):
        right = run(elastic, x)
        for parameter in elastic.parameters():
            parameter.zero_()
        assert all(torch.equal(run(model, x), right) for model in copies)


def test_runs_in_bfloat16():
    for kind in KINDS:
        original, elastic = pair(kind)
        x = {
            name: value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in inputs(kind).items()
        }
        original.to(torch.bfloat16), elastic.to(torch.bfloat16)
        with torch.inference_mode():
            assert torch.equal(run(original, x), run(elastic, x))
            with elit.budget(3):
                assert run(elastic, x).isfinite().all()
