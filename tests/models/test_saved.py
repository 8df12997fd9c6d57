"""Networks by name, saved whole or not at all, and their weights offloaded, spread and cast."""

import json
import subprocess
import sys

import accelerate
import pytest
import torch
from conftest import inputs, opened, small_vae
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
from peft import LoraConfig

import elit
from elit.elastic.load import load_model
from elit.models.presets import model_config
from elit.models.saved import save_model
from elit.sampling.pipeline import ElitPipeline
from elit.sampling.sample import sample


@pytest.fixture
def saved(tmp_path):
    model = opened("elit-dit")
    save_model(model, tmp_path / "model")
    return model, tmp_path / "model"


def test_round_trip(saved):
    model, folder = saved
    save_model(model, folder)  # over an earlier one
    assert load_model(folder, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    load_model(folder).save_pretrained(folder.parent / "again")
    assert (folder.parent / "again" / "config.json").read_text() == (folder / "config.json").read_text()


def test_a_missing_or_cut_off_model_is_named(saved, tmp_path):
    _, folder = saved
    weights = folder / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match="must be a folder that save_pretrained wrote"):
        load_model(tmp_path / "nothing")
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"safetensors': half-written or damaged"):
        load_model(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"must be a folder with \.safetensors in it"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="must be a folder that save_pretrained wrote"):
        load_model(folder)


def test_weights_that_lack_a_part_are_refused(saved):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    config["depth"] = 5
    config["interface"]["split"] = [1, 3, 1]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"weights do not fit.*blocks\.4\."):
        load_model(folder)


def test_another_librarys_model_is_refused(tmp_path):
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    UNet2DModel(block_out_channels=(32,), **blocks).save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match=r"must be a folder of one of DiT, .* not of a 'UNet2DModel'"):
        load_model(tmp_path / "unet")


def test_names():
    names = elit.list_models()
    families = ["DiT-{}", "U-ViT-{}", "HDiT-{}", "MM-DiT-{}", "DiT-{}-Video", "SiT-{}"]
    rows = [f.format(f"{size}/{patch}") for f in families for size in ("S", "B", "L", "XL") for patch in (1, 2, 4)]
    assert set(names) == {f"{e}{row}" for e in ("", "ELIT-") for row in [*rows, "MM-DiT-Qwen-Image/2"]}
    assert len(names) == len(set(names))
    assert all(model_config(name) for name in names)


@pytest.mark.parametrize("name", [name for name in elit.list_models() if "-S/" in name or "/2" in name])
def test_every_preset_builds(name):
    with torch.device("meta"):
        model = elit.create_model(name)
    assert bool(model.budgets) == name.startswith("ELIT-")
    assert model.sample_size == ((8, 32, 32) if "Video" in name else (128, 128) if "Qwen" in name else (32, 32))
    assert name.removeprefix("ELIT-").replace("-", "").startswith(type(model).__name__)
    assert elit.count_flops(name) == elit.count_flops(model) > 0


def test_the_shapes_of_qwen_image_and_video():
    with torch.device("meta"):
        qwen, video = elit.create_model("ELIT-MM-DiT-Qwen-Image/2"), elit.create_model("ELIT-DiT-XL/2-Video")
    assert (len(qwen.blocks), qwen.config.hidden_size, qwen.config.num_heads) == (60, 3072, 24)
    assert qwen.spec == elit.InterfaceSpec(split=(8, 44, 8), window=(8, 8), num_latents=64)
    assert qwen.token_grid(qwen.sample_size) == (64, 64)
    assert video.spec == elit.InterfaceSpec(split=(4, 20, 4), window=(2, 4, 4), num_latents=32)
    assert video.token_grid(video.sample_size) == (8, 16, 16)
    assert video.config.num_classes == 700


@pytest.mark.parametrize(
    ("name", "split"),
    [("DiT-S", [2, 8, 2]), ("DiT-B", [2, 8, 2]), ("DiT-L", [4, 16, 4]), ("DiT-XL", [4, 20, 4]), ("SiT-XL", [8, 16, 4])],
)
def test_splits_of_the_paper_and_of_the_published_checkpoint(name, split):
    assert model_config(f"ELIT-{name}/2")[1]["interface"]["split"] == split


@pytest.mark.parametrize(
    ("settings", "window", "latents"),
    [
        ({}, [4, 4], 16),
        ({"sample_size": 64}, [8, 8], 64),
        ({"sample_size": (8, 32, 32), "patch_size": (1, 2, 2)}, [2, 4, 4], 32),
        ({"window": (2, 2)}, [2, 2], 4),
        ({"num_latents": 8}, [4, 4], 8),
    ],
)
def test_windows_give_sixteen_groups_an_image(settings, window, latents):
    interface = model_config("ELIT-DiT-S/2", **settings)[1]["interface"]
    assert (interface["window"], interface["num_latents"]) == (window, latents)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ELIT-DiT-XXL/2", {}, r"unknown model 'ELIT-DiT-XXL/2'; close names: ELIT-DiT-XL/2"),
        ("DiT-S/2", {"sample_size": 33}, r"nearest valid: 32 or 34.*got \(33, 33\)"),
        ("ELIT-SiT-S/2", {"sample_size": 32, "window": (3, 3)}, "nearest valid: 30 or 36"),
        ("ELIT-DiT-S/2", {"window": (4, 4, 4)}, r"window must be 2 numbers.*got \(4, 4, 4\)"),
        ("ELIT-DiT-S/2", {"split": (1, 2, 1), "depth": 6}, r"split must be 6 = depth in all, got \(1, 2, 1\)"),
        ("ELIT-DiT-S/2", {"wdith": 3}, "unknown setting 'wdith'; valid ones"),
        ("DiT-S/2", {"window": (4, 4)}, "a baseline takes no split, window or num_latents"),
        ("DiT-S/2", {"hidden_size": 100}, "hidden_size must be a multiple of .* = 12, got 100"),
        ("ELIT-DiT-S/2", {"hidden_size": 24, "num_heads": 6}, "num_heads must be at most 4, for heads of 6, got 6"),
        ("ELIT-HDiT-XL/2", {"split": (9, 10, 9)}, r"split must be a core with blocks 8 to 20 in it, got \(9, 10, 9\)"),
        ("ELIT-HDiT-XL/2", {"num_latents": 6}, "num_latents must be a multiple of 4, got 6"),
        ("MM-DiT-S/2", {"text_features": 24, "pooled_features": 5}, "pooled_features must be 0 or text_features = 24"),
    ],
)
def test_what_does_not_fit_is_named(name, settings, message):
    with pytest.raises(ValueError, match=message):
        elit.create_model(name, **settings)


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


@pytest.mark.parametrize("kind", [*KINDS, "elit-uvit", "dit"])
def test_adapters_of_peft(kind, tmp_path):
    model = opened(kind)
    x, t, y = inputs(model)
    with torch.no_grad():
        plain = model(x, t, y)
        model.add_adapter(LoraConfig(r=2, target_modules=["q", "kv", "proj", "fc1"], init_lora_weights=False))
        adapted = model(x, t, y)
        assert (adapted - plain).abs().max() > 0.01
        model.save_lora_adapter(tmp_path)
        model.disable_adapters()
        assert torch.equal(model(x, t, y), plain)
        other = opened(kind)
        other.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
        assert torch.equal(other(x, t, y), adapted)
        other.fuse_lora()
        torch.testing.assert_close(other(x, t, y), adapted)
        other.unfuse_lora()
        other.unload_lora()
        torch.testing.assert_close(other(x, t, y), plain)


def test_diffusers_alone_loads_what_is_saved(tmp_path):
    """In a process that imports nothing of this library by hand; the class itself trusts no code of a folder."""
    pipe = ElitPipeline(opened("elit-dit"), FlowMatchEulerDiscreteScheduler(), small_vae())
    pipe.save_pretrained(tmp_path)
    code = "from diffusers import AutoModel, DiffusionPipeline; import sys; folder = sys.argv[1]; "
    code += "loaded = [DiffusionPipeline.from_pretrained(folder, trust_remote_code=True).transformer, "
    code += "AutoModel.from_pretrained(f'{folder}/transformer', trust_remote_code=True)]; "
    code += (
        "print([type(each).__name__ for each in loaded], loaded[0].config == loaded[1].config, loaded[0].budgets[-1])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, tmp_path], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "['DiT', 'DiT'] True 16", done.stderr
    assert "not expected" not in done.stderr
    (tmp_path / "pipeline.py").write_text("raise SystemExit")
    again = ElitPipeline.from_pretrained(tmp_path)
    assert type(again) is ElitPipeline
    assert dict(again.transformer.config) | {"_name_or_path": 0} == dict(pipe.transformer.config) | {"_name_or_path": 0}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["elit-dit", "elit-sit"])
def test_an_exported_network_takes_any_batch(kind):
    model, batch = opened(kind), torch.export.Dim("batch", min=2, max=64)
    shapes = {name: {0: batch} for name in ("x", "t", "y")} | {"budget": None}
    exported = torch.export.export(model, inputs(model, 4), {"budget": 4}, dynamic_shapes=shapes).module()
    with torch.no_grad():
        for count in (2, 7):
            assert torch.equal(exported(*inputs(model, count), budget=4), model(*inputs(model, count), 4))
