"""Names, splits and windows."""

import pytest
import torch

import elit
from elit.models.dit import DiT
from elit.models.presets import model_config


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


def test_overrides():
    assert model_config("ELIT-DiT-B/2", split=(4, 4, 4))[1]["depth"] == 12
    assert model_config("ELIT-DiT-B/2", split=(1, 2, 1))[1]["depth"] == 4
    assert model_config("ELIT-DiT-S/2", depth=6)[1]["interface"]["split"] == [1, 4, 1]
    for depth in range(1, 40):
        assert sum(DiT.default_split(depth)) == depth


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
        ("DiT-S/2", {"num_classes": 0}, "num_classes must be .*got 0"),
        ("DiT-S/2", {"patch_size": 0}, "patch_size must be at least 1 along each axis, got 0"),
        ("ELIT-DiT-S/2", {"hidden_size": 24, "num_heads": 6}, "num_heads must be at most 4, for heads of 6, got 6"),
        ("DiT-S/2", {"sample_size": (8, 8, 8), "patch_size": (2, 2)}, "sample_size must be 2 numbers"),
        ("ELIT-DiT-S/2", {"split": (1, 0, 1)}, r"split must be .* got \(1, 0, 1\)"),
        ("ELIT-HDiT-XL/2", {"split": (9, 10, 9)}, r"split must be a core with blocks 8 to 20 in it, got \(9, 10, 9\)"),
        ("ELIT-HDiT-XL/2", {"num_latents": 6}, "num_latents must be a multiple of 4, got 6"),
        ("MM-DiT-S/2", {"text_features": 24, "pooled_features": 5}, "pooled_features must be 0 or text_features = 24"),
        ("MM-DiT-S/2", {"text_features": 23, "pooled_features": 0}, "text_features must be even for characters"),
    ],
)
def test_what_does_not_fit_is_named(name, settings, message):
    with pytest.raises(ValueError, match=message):
        elit.create_model(name, **settings)
