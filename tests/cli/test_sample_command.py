"""`elit sample`: pictures of every kind in every form, and the same again with --like."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import SAVED, opened, small_vae
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

import elit
from elit.cli.main import main
from elit.models.saved import save_model
from elit.sampling.pictures import read_text
from elit.sampling.pipeline import ElitPipeline

pytestmark = pytest.mark.usefixtures("empty_folder")


def test_clips_as_strips_animation_array_and_folder(run, models):
    frames, rows, columns = SAVED["clips"][1]["sample_size"]
    for out in ("strips.png", "moving.gif", "array.npz", "folder"):
        line = ("sample", models / "clips", "--steps", "1", "--count", "2", "--guidance", "ag", "--out", out)
        code, said, _ = run(*line)
        assert (code, said.split(",")[0]) == (0, f"{out}: 2 clips")
    width, height = Image.open("strips.png").size
    assert width > frames * columns
    assert height > 2 * rows
    with Image.open("moving.gif") as animation, Image.open("folder/000001.gif") as single:
        assert animation.n_frames == single.n_frames == frames
        assert single.size == (columns, rows)
    assert np.load("array.npz")["arr_0"].shape == (2, frames, rows, columns, 3)


def test_json_comes_last_on_stdout(run, models):
    line = ("sample", models / "model", "--steps", "2", "--guidance", "ccfg", "--budget", "4@0-0.5,1.0@0.5-1", "--json")
    code, out, _ = run(*line)
    result = json.loads(out.splitlines()[-1])
    assert (code, result["count"]) == (0, 10)
    model = elit.load_model(models / "model")
    cost = {budget: elit.count_flops(model, budget=budget) for budget in (1, 4, 16)}
    assert result["gflops_per_image"] == pytest.approx((cost[4] + cost[16] + 2 * cost[1]) / 1e9)
    line = ("sample", models / "model", "--steps", 2, "--sample-budgets", "100%", 4, 1, "--out", "three.png")
    assert run(*line)[1].startswith("three.png: 3 images")
    assert Image.open("three.png").size == (2 * 66 - 2, 2 * 66 - 2)
    assert run(*line[:4], "--step-budgets", "50%", 16, "--out", "steps.png")[0] == 0


def test_latents_where_there_is_no_autoencoder(run, tmp_path):
    save_model(opened("elit-dit"), tmp_path / "m")
    assert run("sample", "m", "--steps", "1", "--out", "x.npz")[0] == 0
    assert np.load("x.npz")["arr_0"].shape == (5, 4, 16, 16)
    code, _, err = run("sample", "m", "--steps", "1")
    assert code == 2
    assert "no pictures" in err
    assert not os.path.exists("samples.png")


def test_a_pipelines_autoencoder(run, tmp_path):
    ElitPipeline(opened("elit-dit"), FlowMatchEulerDiscreteScheduler(), small_vae()).save_pretrained(tmp_path / "pipe")
    assert run("sample", "pipe", "--steps", "1", "--labels", "0", "1", "--dtype", "bfloat16")[0] == 0
    assert Image.open("samples.png").size == (2 * 64 + 2, 64)
    save_model(opened("elit-dit"), tmp_path / "model")
    assert run("sample", "model", "--steps", "1", "--vae", "pipe/vae", "--out", "x.npz")[0] == 0
    assert np.load("x.npz")["arr_0"].shape == (5, 32, 32, 3)


def test_samples_that_are_not_finite_are_a_failed_run(run, models, tmp_path):
    line = ("sample", models / "model", "--steps", 2, "--guidance", "cfg", "--scale", "1e300")
    code, _, error = run(*line)
    assert (code, error.count("\n")) == (1, 1)
    assert "the samples are not finite: give a smaller scale" in error
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved network of pixels, every path open."""
    saved = tmp_path_factory.mktemp("like") / "model"
    opened("elit-dit", in_channels=3).save_pretrained(saved)
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
    assert main(["sample", "--like", str(third), "--count", "3"]) == 2
    assert capsys.readouterr().err == "elit sample: count must be above 3, the number of the picture, got 3\n"


def test_options_beside_it_change_the_settings(folder, tmp_path, capsys):
    a, b, c = (tmp_path / f"{name}.png" for name in "abc")
    sampled(capsys, folder, "--labels", 2, "--steps", 3, "--seed", 4, "--budget", 2, "--out", a)
    sampled(capsys, "--like", a, "--budget", "full", "--seed", 0, "--out", b)
    sampled(capsys, folder, "--labels", 2, "--steps", 3, "--out", c)
    assert np.array_equal(np.asarray(Image.open(b)), np.asarray(Image.open(c)))


def test_other_weights_under_the_same_name_are_refused(folder, tmp_path, capsys):
    picture, other = tmp_path / "a.png", tmp_path / "model"
    model = opened("elit-dit", in_channels=3)
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
    messages = {"plain.png": "has no settings in it", "text.png": "not a picture", "missing.png": "no such file"}
    for name, message in messages.items():
        assert main(["sample", "--like", str(tmp_path / name)]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
