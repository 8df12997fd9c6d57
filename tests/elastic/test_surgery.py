"""Refusals of elastify, parts that it leaves alone, and the order of a window's places."""

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
from elit.elastic.interface import coarse_to_fine, kept_tokens, spread_to_window
from elit.models.windows import Windows


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


CPU = torch.device("cpu")


@pytest.mark.parametrize("window", [(1, 1), (4, 4), (8, 8), (3, 5), (2, 4, 4), (1, 6)])
def test_every_prefix_covers_the_window_evenly(window):
    order = coarse_to_fine(window)
    places = Windows(window, window).raster.float()
    assert sorted(order) == list(range(len(places)))
    sides = torch.tensor(window, dtype=torch.float32)
    for kept in range(2, len(order) + 1):
        apart = (places[list(order[:kept])][:, None] - places).abs()
        reach = torch.minimum(apart, sides - apart).square().sum(-1).sqrt()  # on the torus
        hole = reach.min(0).values.max()  # the place farthest from what is carried
        among = reach[:, list(order[:kept])] + torch.diag(torch.full((kept,), torch.inf))
        assert among.min() >= hole - 1e-5  # carried ones keep at least that distance: none is wasted


def test_dropped_places_take_the_mean_of_their_nearest():
    spread = spread_to_window((1, 4), 2)  # carries places 2 and 0
    assert coarse_to_fine((1, 4))[:2] == (2, 0)
    assert torch.equal(spread, torch.tensor([[0, 1], [0.5, 0.5], [1, 0], [1, 0]]))
    assert torch.equal(spread_to_window((4, 4), 16)[list(coarse_to_fine((4, 4)))], torch.eye(16))


@pytest.mark.parametrize("kept", [(1, 1), (5, 5), (16, 16), (16, 4)])
def test_a_plan_finds_its_way_there_and_back(kept):
    grids = ((8, 7), (4, 4))  # two pictures, one behind the other; the first has windows of 4×4 and 4×3
    plan = kept_tokens(grids, (4, 4), kept, CPU)
    tokens = torch.arange(72)
    sorted_tokens = tokens[plan.order]
    assert torch.equal(sorted_tokens[plan.inverse], tokens)
    core = tokens[plan.kept]
    assert torch.equal(core, core.sort().values)
    latents, carried = core[plan.from_core], []
    assert torch.equal(latents[plan.to_core], core)
    assert [grid.budget for grid in plan.grids] == list(kept)
    for grid, of_grid in zip(plan.grids, sorted_tokens.split(plan.tokens), strict=True):
        groups = grid.windows.groups(of_grid[None, :, None])
        for (shape, _), slots, windows in zip(grid.windows.shapes, grid.slots, groups, strict=True):
            assert len(slots) == max(1, round(grid.budget / 16 * shape[0] * shape[1]))
            carried.append(windows[:, slots].flatten())
    assert torch.equal(torch.cat(carried), latents)
    assert plan.full == (kept == (16, 16))


@pytest.mark.parametrize("value", [0, 1.5, "much", [4, 2.0], "0.5@0-0.4"])
def test_what_cannot_be_a_budget_is_said_at_once(value):
    with pytest.raises(ValueError, match="budget"), elit.budget(value):
        pass
    with pytest.raises(ValueError, match="budget"), elit.budget(1, guidance=value):
        pass
