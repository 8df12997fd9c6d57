"""All families: the original at full budget, sensible below it; and that `elit.check_family` finds what is wrong."""

import copy
import dataclasses
import pickle
import re
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from tiny import KINDS, MORE, SPLIT, VIDEOS, build, inputs, open_branches, window
from torch import nn

import elit
from elit.compat import tree_map_only
from elit.elastic.families import CLASSES, FAMILIES

pytestmark = pytest.mark.slow


def grid_of(kind):
    fixed = {"QwenImage21": (6, 10), "ZImage": (9, 6), "DiT": (8, 8)}
    return (3, 5, 6) if kind in VIDEOS else fixed.get(kind.removesuffix("Transformer2DModel"), (9, 7))


def pair(kind, **settings):
    original = build(kind)
    return original, elit.elastify(copy.deepcopy(original), **SPLIT | {"window": window(kind)}, **settings)


def run(model, x):
    return torch.stack(list(model(**x, return_dict=False)[0]))


@pytest.mark.parametrize("kind", KINDS + MORE)
def test_a_family_passes_its_checks(kind):
    for grid in (None, grid_of(kind)) if kind in KINDS else (None,):
        call = inputs(kind, batch=8, grid=grid)
        report = elit.check_family(build(kind), call, **SPLIT | {"window": window(kind)})
        assert report.passed, str(report)


@pytest.mark.parametrize(("kind", "mode"), [*((kind, "carry") for kind in KINDS + MORE), (KINDS[1], "learned")])
def test_uneven_grids_and_checkpointing(kind, mode):
    x = inputs(kind, grid=grid_of(kind))
    if kind.startswith("Chroma"):  # diffusers' own single blocks go without the mask under checkpointing
        del x["attention_mask"]
    original, model = pair(kind, mode=mode)
    with torch.no_grad():
        assert torch.equal(run(model, x), run(original, x)) or mode == "learned"
    open_branches(model)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        with elit.budget(0.3):
            run(model, x).square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], rtol=1e-3, atol=1e-4 * float(grad.abs().max() + 1)), name


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_original_at_full_budget_forward_and_gradient(kind):
    grads = []
    for model in pair(kind):
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
def test_the_dropped_do_not_matter(kind, mode):
    _, elastic = pair(kind, mode=mode)
    open_branches(elastic)
    x = inputs(kind, batch=1)
    assert elastic.budgets == tuple(range(1, 17))
    with torch.no_grad(), elit.budget(5):
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
        half = copies[0].to(torch.bfloat16)  # and runs in it
        x = tree_map_only(torch.Tensor, lambda x: x.bfloat16() if x.is_floating_point() else x, x)
        assert run(half, x).isfinite().all()
        with elit.budget(None):
            assert torch.equal(run(original.to(torch.bfloat16), x), run(half, x))


WRONG = {
    "equal at full budget": ({"output": 0}, "raised"),
    "error and budget": ({"per_token": {}}, "an argument of the blocks that has an entry for each token is missing"),
    "FLOPs": ({"streams": ()}, r"`streams` and `attention` say .*more than 2% off"),
}


@pytest.mark.parametrize("test", WRONG)
def test_the_check_says_what_is_wrong(test, monkeypatch):
    kind = "QwenImageTransformer2DModel"
    changes, words = WRONG[test]
    monkeypatch.setitem(FAMILIES, kind, dataclasses.replace(FAMILIES[kind], **changes))
    report = elit.check_family(build(kind), inputs(kind, batch=8), **SPLIT)
    assert not report.passed
    assert re.search(words, report.findings[test] or ""), str(report)


@pytest.fixture
def registry():
    with patch.dict(FAMILIES), patch.dict(CLASSES):
        yield


@pytest.mark.usefixtures("registry")
def test_a_family_is_registered_once():
    mine = type("Mine", (nn.Module,), {})
    elit.register_family(mine, FAMILIES["DiTTransformer2DModel"])
    elit.register_family(mine, FAMILIES["DiTTransformer2DModel"])
    with pytest.raises(ValueError, match="cannot register a second family for Mine"):
        elit.register_family(mine, FAMILIES["FluxTransformer2DModel"])


def test_captions_of_several_lengths_keep_their_own_places():
    kind = "Lumina2Transformer2DModel"
    x, model = inputs(kind, batch=2), elit.elastify(build(kind), **SPLIT)
    open_branches(model)
    assert len(set(x["encoder_attention_mask"].sum(1).tolist())) == 2
    with torch.no_grad(), elit.budget(3):
        both = model(**x).sample
        for i in (0, 1):
            alone = {name: value[i : i + 1] for name, value in x.items()}
            assert torch.allclose(model(**alone).sample, both[i : i + 1], atol=1e-5)


@pytest.mark.usefixtures("registry")
def test_the_guides_own_class(capsys):
    guide = (Path(__file__).parents[2] / "docs/pipelines.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    (block,) = [each for each in blocks if "register_family" in each]
    exec(block, {})
    assert "FLOPs: passed" in capsys.readouterr().out
    named = set(re.findall(r"^\| .*?\|", guide, flags=re.MULTILINE))
    assert all(any(f"`{name}`" in row for row in named) for name in FAMILIES if name not in CLASSES)
