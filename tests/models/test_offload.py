"""Weights that diffusers and accelerate move while a network runs: offloaded, spread, cast."""

import accelerate
import pytest
import torch
from conftest import inputs, opened, small_vae
from diffusers import FlowMatchEulerDiscreteScheduler

from elit.sampling.pipeline import ElitPipeline
from elit.sampling.sample import sample

KINDS = ["elit-dit", "elit-sit", "elit-mmdit", "elit-hdit"]
CPU = torch.device("cpu")


def grouped(kind, **options):
    def offload(model, folder):
        model.enable_group_offload(CPU, CPU, offload_type=kind, offload_to_disk_path=str(folder), **options)

    return offload


def spread(model, folder):
    model.save_pretrained(folder / "saved")
    memory = {"cpu": accelerate.utils.compute_module_sizes(model)[""] // 2}
    options = {"device_map": "auto", "max_memory": memory, "offload_folder": folder / "offloaded"}
    return type(model).from_pretrained(folder / "saved", **options)


WAYS = {
    "leaves": grouped("leaf_level"),
    "blocks": grouped("block_level", num_blocks_per_group=1),
    "cpu": lambda model, _: accelerate.cpu_offload(model, CPU),
    "disk": lambda model, folder: accelerate.disk_offload(model, str(folder), CPU),
    "spread": spread,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_offloaded_network_is_the_plain_one(kind, way, tmp_path):
    model = opened(kind)
    x, t, y = inputs(model)
    with torch.no_grad():
        plain = [model(x, t, y, budget) for budget in (None, 0.5)]
        model = WAYS[way](model, tmp_path) or model
        for budget, expected in zip((None, 0.5, None), (*plain, plain[0]), strict=True):
            assert torch.equal(model(x, t, y, budget), expected)
    assert way != "spread" or "disk" in model.hf_device_map.values()


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_offloaded_module_by_module_is_the_plain_one(kind):
    """As enable_sequential_cpu_offload does it; that itself stumbles over "cpu:0" in accelerate, stock models alike."""
    model, vae = opened(kind), small_vae(scaling_factor=0.5)
    y = model.conditioning.example(2)
    pipe = ElitPipeline(model, FlowMatchEulerDiscreteScheduler(), vae)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt_embeds" if model.takes_text else "class_labels": y, "num_inference_steps": 3, "cache": 0.01}
    call |= {"latents": torch.randn(2, 4, 16, 16), "output_type": "pt", "guidance_scale": 2.0, "budget": 0.5}
    plain = pipe(**call).images
    for module in (model, vae):
        accelerate.cpu_offload(module, CPU)
    assert torch.equal(pipe(**call).images, plain)


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16])
@pytest.mark.parametrize("kind", [*KINDS, "mmdit-embeddings", "elit-uvit"])
def test_weights_can_be_kept_in_a_smaller_dtype(kind, storage):
    model = opened(kind)
    x, t, y = inputs(model)
    with torch.no_grad():
        plain = model(x, t, y)
        model.enable_layerwise_casting(storage, torch.float32)
        cast = model(x, t, y)
    assert {value.dtype for name, value in model.blocks[0].state_dict().items() if "fc1.weight" in name} == {storage}
    assert cast.dtype == torch.float32
    assert (cast - plain).square().mean() < 0.2 * plain.square().mean()
    sample(model, model.conditioning.example(1), steps=1)


@pytest.mark.parametrize("kind", [*KINDS, "dit", "elit-uvit"])
def test_under_autocast_the_stream_of_every_block_has_the_tokens_dtype(kind):
    model, seen = opened(kind), set()
    for module in (*model.blocks, model.final):
        module.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(*inputs(model))
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["dit", "elit-dit", "elit-sit"])
def test_a_backend_of_attention_that_would_have_no_effect_is_refused(kind):
    model = opened(kind)
    model.set_attention_backend("native")
    with pytest.raises(ValueError, match=r"backend must be native; .*, got 'flash'"):
        model.set_attention_backend("flash")


@pytest.mark.parametrize(("kind", "settings"), [("elit-dit", {}), ("elit-mmdit", {}), ("sit", {"convention": "ddpm"})])
def test_the_velocity_comes_bare_or_as_an_output_of_diffusers(kind, settings):
    model = opened(kind, **settings)
    x, t, y = inputs(model)
    plain = model(x, t, y)
    assert torch.equal(model(x, t, y, return_dict=True).sample, plain)
    assert torch.equal(model(x, t, y, return_dict=False), plain)
