"""ElitPipeline as a diffusers pipeline."""

import numpy as np
import pytest
import torch
from conftest import opened, small_vae
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

import elit
from elit.pipeline import ElitPipeline, decode
from elit.sampling import sample, seeded_noise


def pipeline(vae=None) -> ElitPipeline:
    pipe = ElitPipeline(opened("elit-dit"), FlowMatchEulerDiscreteScheduler(), vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("call", "guidance"),
    [
        ({}, None),
        ({"budget": 0.5}, None),
        ({"budget": "4@0-0.5,16@0.5-1"}, None),
        ({"budget": 8, "guidance_scale": 2.0}, elit.CFG(2.0)),
        ({"guidance_scale": 2.0, "guidance_budget": 1}, elit.CCFG(2.0, 1)),
    ],
)
def test_matches_sample_on_the_same_noise(call, guidance):
    pipe = pipeline()
    noise = seeded_noise([3, 4], (4, 16, 16))
    out = pipe([0, 1], num_inference_steps=6, latents=noise, output_type="latent", **call).images
    expected = sample(pipe.transformer, [0, 1], steps=6, noise=noise, budget=call.get("budget"), guidance=guidance)
    assert torch.allclose(out, expected, atol=1e-5)


def test_generators_are_the_seeds_of_sample():
    pipe = pipeline()
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    out = pipe([0, 1], num_inference_steps=2, generator=generators, output_type="latent").images
    assert torch.allclose(out, sample(pipe.transformer, [0, 1], steps=2, seed=3), atol=1e-5)


def test_a_shifted_scheduler_is_a_shifted_grid():
    pipe = pipeline()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    noise = seeded_noise([0], (4, 16, 16))
    out = pipe(0, num_inference_steps=5, latents=noise, output_type="latent").images
    assert torch.allclose(out, sample(pipe.transformer, 0, steps=5, shift=2.0, noise=noise), atol=1e-5)


@pytest.mark.parametrize("with_vae", [False, True])
def test_saves_loads_and_runs(tmp_path, with_vae):
    pipe = pipeline(small_vae(scaling_factor=0.5, shift_factor=0.1) if with_vae else None)
    pipe.save_pretrained(tmp_path)
    loaded = ElitPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert (loaded.vae is not None) == with_vae
    kind = "np" if with_vae else "latent"
    call = {"num_inference_steps": 2, "output_type": kind, "budget": 4}
    first, second = (p(1, generator=torch.Generator().manual_seed(0), **call).images for p in (pipe, loaded))
    assert np.array_equal(np.asarray(first), np.asarray(second))
    assert isinstance(loaded, DiffusionPipeline)
    assert elit.load_model(tmp_path).budgets == pipe.transformer.budgets


def test_output_types():
    pipe = pipeline(small_vae())
    out = {kind: pipe([0, 1], num_inference_steps=1, output_type=kind).images for kind in ("pil", "np", "pt", "latent")}
    assert [image.size for image in out["pil"]] == [(32, 32)] * 2
    assert out["np"].shape == (2, 32, 32, 3)
    assert 0 <= out["np"].min() <= out["np"].max() <= 1
    assert out["pt"].shape == (2, 3, 32, 32)
    assert out["latent"].shape == (2, 4, 16, 16)
    assert isinstance(pipe(0, num_inference_steps=1, return_dict=False), tuple)


def test_decode_undoes_scale_and_shift():
    vae = small_vae(scaling_factor=0.5, shift_factor=0.1)
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert torch.allclose(decode(vae, (z - 0.1) * 0.5), vae.decode(z).sample, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"class_labels": 6}, "y=6"),
        ({"budget": 17}, "budget=17"),
        ({"guidance_scale": 2.0, "guidance_budget": 0}, "budget=0"),
        ({"output_type": "jpeg"}, "output_type='jpeg'"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"latents": torch.randn(1, 3, 16, 16)}, "latents: shape"),
        ({"output_type": "pil"}, "vae=None: samples of shape"),
    ],
)
def test_bad_calls_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        pipeline()(**{"class_labels": 0, "num_inference_steps": 1, "output_type": "latent"} | call)
