"""All families: the original at full budget, sensible below it; and that `elit.check_family` finds what is wrong."""

import copy
import dataclasses
import pickle
import re
from pathlib import Path
from unittest.mock import patch

import diffusers
import pytest
import torch
from parts import PIPELINES
from tiny import KINDS, MORE, SPLIT, VIDEOS, build, inputs, open_branches, window
from torch import nn

import elit
from elit.compat import tree_map_only
from elit.elastic.distill import Prediction
from elit.elastic.families import CLASSES, FAMILIES
from elit.elastic.pipelines import CallBatch
from elit.sampling.autoencoders import encode_mean

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


def test_samples_are_noised_as_the_schedulers_do():
    """x_t, the time that a class is told, and the target, against diffusers' own schedulers."""
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 3, 4, 4, 4, generator=generator).unbind()
    t = torch.tensor([0.25, 0.7, 0.9])
    euler = diffusers.FlowMatchEulerDiscreteScheduler()
    euler.set_timesteps(sigmas=(1 - t).tolist())
    for kind, time, sign in (
        ("FluxTransformer2DModel", 1 - t, 1),
        ("StableDiffusion3Transformer", 1000 * (1 - t), 1),
        ("ZImageTransformer2DModel", t, -1),
        ("Lumina2Transformer2DModel", t, -1),
    ):
        family = FAMILIES.get(kind, FAMILIES["SD3Transformer2DModel"])
        name = "t" if kind.startswith("Z") else "timestep"
        arguments, target = Prediction(euler, family).call(x, noise, t, CallBatch({name: torch.zeros(3)}))
        sample = arguments[family.sample]
        noisy = torch.stack(sample) if family.listed else sample
        assert torch.allclose(noisy, euler.scale_noise(x, euler.timesteps, noise), atol=1e-6)
        assert torch.allclose(arguments[name], time)
        assert torch.allclose(target, sign * (noise - x))
    for prediction in ("epsilon", "v_prediction"):
        ddim = diffusers.DDIMScheduler(prediction_type=prediction)
        start = CallBatch({"timestep": torch.zeros(3, dtype=torch.long)})
        arguments, target = Prediction(ddim, FAMILIES["DiTTransformer2DModel"]).call(x, noise, t, start)
        steps = arguments["timestep"]
        assert steps.tolist() == [750, 300, 100]
        assert torch.allclose(arguments["hidden_states"], ddim.add_noise(x, noise, steps), atol=1e-6)
        right = noise if prediction == "epsilon" else ddim.get_velocity(x, noise, steps)
        assert torch.allclose(target, right, atol=1e-6)


def test_latents_are_packed_and_normalized_as_the_pipeline_does():
    pipe = PIPELINES["FluxImg2ImgPipeline"].make()
    pixels = 2 * torch.rand(1, 3, 32, 32) - 1
    encoded = pipe._encode_vae_image(pixels, [torch.Generator()])
    packed = pipe._pack_latents(encoded, 1, 4, 8, 8)
    mean = encode_mean(pipe.vae, pixels)
    posterior = pipe.vae.encode(pixels).latent_dist
    noise = (encoded / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor - posterior.mean) / posterior.std
    ours = mean + noise * posterior.std * pipe.vae.config.scaling_factor
    assert torch.allclose(FAMILIES["FluxTransformer2DModel"].pack(ours), packed, atol=1e-4)
