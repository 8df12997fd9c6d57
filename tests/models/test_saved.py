"""Saved models that are missing, cut off or foreign are named; a save is whole or absent."""

import json

import pytest
import torch
from conftest import opened
from diffusers import UNet2DModel

from elit.elastic.load import load_model
from elit.models.saved import checkpoints, save_model


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


def test_only_complete_checkpoints_count(tmp_path):
    for name in ("step-00000020", "step-00000003", ".step-00000030.tmp", "step-x"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000003", "step-00000020"]
