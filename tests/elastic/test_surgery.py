"""Refusals of elastify, and parts that it leaves alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import accelerate
import diffusers
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from peft import LoraConfig
from tiny import SPLIT, build, draw, elastic_pipeline, inputs, pipeline, window
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import elit
from elit.elastic.cost import count_block_flops


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"read_after": 3}, "got 3 and 3"),
        ({"write_after": 5}, "got 1 and 5"),
        ({"window": (4,)}, r"window must have 2 sides of at least 1 token, got \(4,\)"),
        ({"window": (4, 0)}, r"got \(4, 0\)"),
        ({"mode": "magic"}, "mode must be carry or learned, got 'magic'"),
    ],
)
def test_bad_settings_are_one_line(changes, said):
    with pytest.raises(ValueError, match=said) as caught:
        elit.elastify(build("DiTTransformer2DModel"), **SPLIT | changes)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="cannot elastify a Linear"):
        elit.elastify(nn.Linear(2, 2), **SPLIT)


def test_forwards_that_do_not_fit_are_one_line():
    x = inputs("SD3Transformer2DModel")
    model = elit.elastify(build("SD3Transformer2DModel"), **SPLIT)
    with elit.budget(17), pytest.raises(ValueError, match=r"budget must be .*\(1 to 16\), .* got 17"):
        model(**x)
    with pytest.raises(ValueError, match="skip_layers must leave out 2"):
        model(**x, skip_layers=[2])
    residuals = [torch.ones(2, 64, 24)] * 4
    assert model(**x, block_controlnet_hidden_states=residuals).sample.isfinite().all()
    with elit.budget(8), pytest.raises(ValueError, match="residuals are for all tokens"):
        model(**x, block_controlnet_hidden_states=residuals)
    with pytest.raises(RuntimeError, match="inside the transformer's forward only"):
        model.transformer_blocks[1](torch.zeros(1, 64, 24), torch.zeros(1, 5, 24), torch.zeros(1, 24))


def test_first_block_cache_needs_a_block_before_read():
    model = elit.elastify(build("QwenImageTransformer2DModel"), **SPLIT | {"read_after": 0})
    with pytest.raises(ValueError, match="read_after must be at least 1 with FirstBlockCache"):
        model.enable_cache(FirstBlockCacheConfig())
    assert not model.is_cache_enabled
    with torch.no_grad(), elit.budget(4):
        assert model(**inputs("QwenImageTransformer2DModel")).sample.isfinite().all()


@pytest.mark.parametrize("kind", ["DiT", "DiTTransformer2DModel"])
def test_costs_are_counted_by_its_own_count(kind):
    sizes = {"sample_size": 8, "in_channels": 1, "num_classes": 10, "hidden_size": 24, "num_heads": 2, "depth": 4}
    model = elit.create_model("DiT-S/1", **sizes) if kind == "DiT" else build(kind)
    elit.elastify(model, **SPLIT)
    for budget in (None, 4):
        if kind == "DiT":
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                model(torch.randn(1, 1, 8, 8), torch.tensor([0.5]), torch.tensor([1]), budget=budget)
            assert elit.count_flops(model, budget=budget) == counter.get_total_flops()
            continue
        with pytest.raises(ValueError, match=f"count_block_flops, got '{kind}'"):
            elit.count_flops(model, budget=budget)
    assert count_block_flops(model, tokens=((8, 8),), budget=4) < count_block_flops(model, tokens=((8, 8),))
    with pytest.raises(ValueError, match=r"must be a network of this library or the name of a preset.* got .Linear"):
        elit.count_flops(nn.Linear(2, 2))


def test_flux_reads_its_grid_from_coordinates():
    x = inputs("FluxTransformer2DModel")
    original, model = build("FluxTransformer2DModel"), elit.elastify(build("FluxTransformer2DModel"), **SPLIT)
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(16.0), indexing="ij")
    wide = torch.stack((torch.zeros(4, 16), rows, columns), -1).flatten(0, 1)
    pair = torch.cat((x["img_ids"], x["img_ids"] + torch.tensor([1.0, 0, 0])))  # a picture and one it refers to
    two = torch.cat((x["hidden_states"],) * 2, 1)
    for changed in ({"img_ids": wide}, {"img_ids": pair, "hidden_states": two}):
        with torch.no_grad():
            assert torch.equal(model(**x | changed).sample, original(**x | changed).sample)
            with elit.budget(4):
                assert model(**x | changed).sample.isfinite().all()
    with pytest.raises(ValueError, match="img_ids: not the coordinates of whole grids"):
        model(**x | {"img_ids": x["img_ids"].flip(0)})


@pytest.mark.parametrize("kind", ["QwenImageTransformer2DModel", "WanTransformer3DModel"])
def test_times_of_tokens_are_the_kept_ones(kind):
    """An edited image's condition is at time zero; Wan may have a time for each token."""
    x, settings = inputs(kind), {"zero_cond_t": True} if kind.startswith("Qwen") else {}
    if settings:
        x["img_shapes"] = [[(1, 4, 8), (1, 8, 4)]] * 2
    else:
        x["timestep"] = x["timestep"][:, None].expand(-1, 64).contiguous()
    original, model = build(kind, **settings), build(kind, **settings)
    elit.elastify(model, **SPLIT | {"window": window(kind)})
    with torch.no_grad():
        assert torch.equal(model(**x).sample, original(**x).sample)
        with elit.budget(4):
            assert model(**x).sample.isfinite().all()


def test_a_budget_is_of_its_own_thread_and_block():
    model = elit.elastify(build("DiTTransformer2DModel"), **SPLIT)
    x = inputs("DiTTransformer2DModel")
    right = {}
    with torch.no_grad():
        for kept in (1, 16):
            with elit.budget(kept):
                right[kept] = model(**x).sample
        gate = threading.Barrier(2)

        def work(kept):
            with torch.no_grad(), elit.budget(kept):
                gate.wait()
                return all(torch.equal(model(**x).sample, right[kept]) for _ in range(3))

        with ThreadPoolExecutor(2) as pool:
            assert all(pool.map(work, (1, 16)))
        with elit.budget(1), elit.budget(None):
            assert torch.equal(model(**x).sample, right[16])
        assert torch.equal(model(**x).sample, right[16])


@pytest.mark.parametrize("kind", ["block_level", "leaf_level", "sequential"])
def test_offloading_brings_the_interface_along(kind):
    """Sequential: accelerate's hooks load a module's own weights when its forward is called."""
    model, cpu = elit.elastify(build("QwenImageTransformer2DModel"), **SPLIT), torch.device("cpu")
    x = inputs("QwenImageTransformer2DModel")
    with torch.no_grad(), elit.budget(4):
        right = model(**x).sample
        if kind == "sequential":
            accelerate.cpu_offload(model, cpu)
            assert model.elastic.latents.is_meta
        else:
            options = {"offload_type": kind, "num_blocks_per_group": 1 if kind == "block_level" else None}
            model.enable_group_offload(onload_device=cpu, offload_device=cpu, **options)
        assert torch.equal(model(**x).sample, right)


def test_a_saved_lora_is_loaded_by_the_pipelines_own_means(tmp_path):
    trained, plain, elastic = pipeline("FluxPipeline"), pipeline("FluxPipeline"), elastic_pipeline("FluxPipeline")
    trained.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    trained.transformer.save_lora_adapter(tmp_path)
    bare = draw(elastic)
    for pipe in (plain, elastic):
        pipe.transformer.load_lora_adapter(tmp_path / "pytorch_lora_weights.safetensors", prefix=None)
    assert torch.equal(draw(elastic), draw(plain))
    assert not torch.equal(draw(elastic), bare)
    elastic.transformer.set_adapters(["default_0"], weights=[0.5])
    assert not torch.equal(draw(elastic), draw(plain))
    assert isinstance(elastic.transformer, diffusers.FluxTransformer2DModel)
