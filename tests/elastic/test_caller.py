"""Branches of a batch and steps of forwards, as the pipeline says them, never guessed."""

import sys
from pathlib import Path

import diffusers
import pytest
import tiny
import torch
from tiny import SPLIT, TEXT, Spy, elastic_pipeline

import elit

sys.path.insert(0, str(Path(__file__).parents[2] / "studies" / "pipelines"))
from parts import PIPELINES as STOCK


@pytest.fixture
def sd3(monkeypatch):
    pipe = elastic_pipeline("StableDiffusion3Pipeline")
    return pipe, Spy(pipe.transformer, monkeypatch)


def draw(pipe, batch: int = 2, **settings):
    """Prompts that start from the same noise."""
    latents = torch.ones(batch, 4, 16, 16)
    return tiny.draw(pipe, batch=batch, latents=latents, output_type="latent", **settings)


def test_two_prompts_with_the_same_noise_are_no_two_branches(sd3):
    pipe, spy = sd3
    with elit.budget(8, guidance=1):
        draw(pipe, guidance_scale=1.0)
        draw(pipe, batch=1, guidance_scale=3.0)  # the same number of samples, of two branches
    assert spy.seen == [(8, 2)] * 2 + [(1, 1), (8, 1)] * 2


def test_dit_says_it_by_its_guidance_scale(monkeypatch):
    pipe = elastic_pipeline("DiTPipeline")
    spy = Spy(pipe.transformer, monkeypatch)
    monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda shape, **_: torch.ones(shape))
    with elit.budget(8, guidance=1):
        pipe([1, 2], 1.0, num_inference_steps=1, output_type="pt")
        pipe([1], 4.0, num_inference_steps=1, output_type="pt")
    assert spy.seen == [(8, 2), (8, 1), (1, 1)]


def test_pixart_says_it_in_a_name_of_its_own(monkeypatch):
    pipe = diffusers.PixArtSigmaPipeline(**STOCK["PixArtAlphaPipeline"].make().components)
    pipe.set_progress_bar_config(disable=True)
    elit.elastify(pipe, **SPLIT)
    spy = Spy(pipe.transformer, monkeypatch)
    text, mask = torch.randn(2, TEXT, 20), torch.ones(2, TEXT)
    negative = {"negative_prompt_embeds": text, "negative_prompt_attention_mask": mask, "negative_prompt": None}
    call = {"prompt_embeds": text, "prompt_attention_mask": mask, "latents": torch.ones(2, 4, 16, 16)} | negative
    call |= {"height": 64, "width": 64, "num_inference_steps": 1, "output_type": "latent"}
    with elit.budget(8, guidance=1):
        for scale in (1.0, 3.0):
            pipe(**call, use_resolution_binning=False, guidance_scale=scale)
    assert spy.seen == [(8, 2), (1, 2), (8, 2)]


def test_skip_layer_guidance_runs_the_conditional_branch_once_more(sd3):
    """A third forward a step, of one branch: at its budget, and without counting as a step."""
    pipe, spy = sd3
    skip = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    with elit.budget([4, 16], guidance=1):
        draw(pipe, guidance_scale=3.0, **skip)
    assert spy.seen == [(1, 2), (4, 2), (1, 2), (16, 2), (16, 2)]  # it starts behind the first step


def test_a_second_order_scheduler_counts_timesteps(sd3):
    """Heun's runs the network twice a step; the second time at the next one's timestep, where the budget is its own."""
    pipe, spy = sd3
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    with elit.budget([4, 8, 16]):
        draw(pipe, batch=1, num_inference_steps=3, guidance_scale=1.0)
    assert spy.kept() == [4, 8, 8, 16, 16]
    with elit.budget([4, 8]), pytest.raises(ValueError, match="a list of 2 budgets for 3 steps"):
        draw(pipe, batch=1, num_inference_steps=3, guidance_scale=1.0)


def test_steps_that_share_a_timestep_in_bfloat16_are_two(monkeypatch):
    pipe = elastic_pipeline("FluxPipeline").to(torch.bfloat16)
    spy = Spy(pipe.transformer, monkeypatch)
    with elit.budget([4, 8, 16]):
        tiny.draw(pipe, steps=3, sigmas=[1.0, 0.999, 0.5], true_cfg_scale=1.0, output_type="latent")
    assert spy.kept() == [4, 8, 16]


def test_three_branches_are_refused(sd3, monkeypatch):
    pipe, _ = sd3
    monkeypatch.setattr(type(pipe), "do_perturbed_attention_guidance", True, raising=False)
    with elit.budget(8, guidance=1), pytest.raises(ValueError, match="perturbs attention in another branch"):
        draw(pipe)


@pytest.mark.parametrize(
    "name", ["FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxKontextPipeline (edit)", "ChromaPipeline"]
)
def test_branches_that_a_pipeline_does_not_label_have_their_budgets(name, monkeypatch):
    """Two calls a step with the same sample, without a cache context: the second is the unconditional one."""
    pipe = elit.elastify(STOCK[name].make(), **SPLIT)
    spy = Spy(pipe.transformer, monkeypatch)
    with elit.budget(8, guidance=1):
        STOCK[name].run(pipe)
    kept = spy.kept()
    assert kept == [8, 1] * max(2, len(kept) // 2)
