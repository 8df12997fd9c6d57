"""Every supported class: the original at full budget, sensible below it, and as cheap as the closed form says."""

import copy
import pickle

import pytest
import torch
from tiny import KINDS, TEXT, build, inputs, open_branches, window
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import elit
from elit.elastic.cost import count_block_flops

pytestmark = pytest.mark.slow

BUDGETS = (16, 12, 8, 6, 4, 2, 1)


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


def measured(model, x):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(model, x)
    return counter.get_total_flops()


# Windows divide none of them: as Qwen-Image's 83×83 and 104×58 with 8×8, and Wan's 21×30×52 with 2×4×4.
UNEVEN = {
    "QwenImageTransformer2DModel": (11, 11),
    "FluxTransformer2DModel": (13, 6),
    "WanTransformer3DModel": (3, 7, 6),
}


@pytest.mark.parametrize("kind", UNEVEN)
def test_grids_that_do_not_divide(kind):
    original, elastic = pair(kind)
    x, grid = inputs(kind, batch=8, grid=UNEVEN[kind]), UNEVEN[kind]
    errors = []
    with torch.no_grad():
        right = run(original, x)
        for kept in BUDGETS:
            with elit.budget(kept):
                errors.append((run(elastic, x) - right).square().flatten(1).mean(1).sqrt().mean())
    assert errors == sorted(errors)
    assert errors[0] == 0
    x = inputs(kind, batch=1, grid=grid)
    counted = {"tokens": (grid,), "text_tokens": TEXT}
    rest = measured(original, x) - count_block_flops(elastic, **counted, interface=False)
    for kept in (16, 4, 1):
        with elit.budget(kept):
            found = measured(elastic, x)
        assert found == pytest.approx(rest + count_block_flops(elastic, **counted, budget=kept), rel=0.02)
    with pytest.raises(ValueError, match="or the token grids"):
        count_block_flops(elastic, tokens=121)


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
