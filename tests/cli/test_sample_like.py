"""`elit sample --like`: a picture says how it was made, and is made again bit for bit."""

import numpy as np
import pytest
import torch
from conftest import SIZES
from PIL import Image

from elit.cli.main import main
from elit.models.presets import create_model
from elit.sampling.pictures import read_text

LATENTS = {"split": (1, 2, 1), "window": (4, 4)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved network of pixels, every path open."""
    torch.manual_seed(0)
    model = create_model("ELIT-DiT-S/2", **SIZES | {"in_channels": 3, "num_classes": 5} | LATENTS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    saved = tmp_path_factory.mktemp("like") / "model"
    model.save_pretrained(saved)
    return saved


def sampled(capsys, *arguments):
    assert main(["sample", *map(str, arguments)]) == 0, capsys.readouterr().err
    return capsys.readouterr()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif"])
def test_a_grid_is_made_again_byte_for_byte(suffix, folder, tmp_path, capsys):
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    options = ["--labels", 3, 1, "--steps", 2, "--budget", 4, "--guidance", "ccfg", "--scale", 2, "--seed", 9]
    sampled(capsys, folder, *options, "--out", first)
    assert "note" not in sampled(capsys, "--like", first, "--out", second).err
    assert first.read_bytes() == second.read_bytes()
    assert str(tmp_path) not in (read_text(first) or "").replace(str(folder), "")


def test_one_file_of_a_folder_is_made_again(folder, tmp_path, capsys):
    """In the batch that it was made in, since rounding depends on it."""
    sampled(capsys, folder, "--count", 5, "--batch-size", 2, "--steps", 2, "--out", tmp_path / "all")
    third = tmp_path / "all" / "000003.png"
    sampled(capsys, "--like", third, "--out", tmp_path / "b.png")
    assert third.read_bytes() == (tmp_path / "b.png").read_bytes()


def test_options_beside_it_change_the_settings(folder, tmp_path, capsys):
    a, b, c = (tmp_path / f"{name}.png" for name in "abc")
    sampled(capsys, folder, "--labels", 2, "--steps", 3, "--seed", 4, "--budget", 2, "--out", a)
    sampled(capsys, "--like", a, "--budget", "full", "--seed", 0, "--out", b)
    sampled(capsys, folder, "--labels", 2, "--steps", 3, "--out", c)
    assert np.array_equal(np.asarray(Image.open(b)), np.asarray(Image.open(c)))
    assert not np.array_equal(np.asarray(Image.open(a)), np.asarray(Image.open(b)))


def test_other_weights_under_the_same_name_are_refused(folder, tmp_path, capsys):
    picture, other = tmp_path / "a.png", tmp_path / "model"
    model = create_model("ELIT-DiT-S/2", **SIZES | {"in_channels": 3, "num_classes": 5} | LATENTS)
    model.save_pretrained(other)
    sampled(capsys, other, "--steps", 1, "--out", picture)
    with torch.no_grad():
        model.patch_embed.weight.add_(1)
    model.save_pretrained(other)
    assert main(["sample", "--like", str(picture)]) == 2
    assert "made by other weights" in capsys.readouterr().err
    assert main(["sample", str(folder), "--like", str(picture), "--out", str(tmp_path / "b.png")]) == 0  # by will


def test_what_cannot_be_repeated_is_one_line(folder, tmp_path, capsys):
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("hello")
    for name, message in (
        ("plain.png", "says nothing of how it was made"),
        ("text.png", "not a picture"),
        ("missing.png", "no such file"),
    ):
        assert main(["sample", "--like", str(tmp_path / name)]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    for row in ("2", "-1", "-99999999999999999999"):
        assert main(["sample", str(folder), "--steps", "1", "--count", "2", "--row", row]) == 2
        assert capsys.readouterr().err == f"elit sample: row={row}: there are 2 images; give 0 to 1\n"
