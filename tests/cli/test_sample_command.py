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
    code, _, error = run("sample", "m", "--steps", "1")
    assert (code, "no pictures" in error, os.path.exists("samples.png")) == (2, True, False)


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


@pytest.fixture
def sampled(run):
    """Runs `elit sample`, which must succeed; gives what it notes."""

    def command(*words):
        code, _, noted = run("sample", *words)
        assert code == 0, noted
        return noted

    return command


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif"])
def test_a_grid_is_made_again_byte_for_byte(sampled, folder, tmp_path, suffix):
    first, second = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    options = ["--labels", 3, 1, "--steps", 2, "--budget", 4, "--guidance", "ccfg", "--scale", 2, "--seed", 9]
    sampled(folder, *options, "--out", first)
    assert "note" not in sampled("--like", first, "--out", second)
    assert first.read_bytes() == second.read_bytes()
    assert str(tmp_path) not in (read_text(first) or "").replace(str(folder), "")


def test_one_file_of_a_folder_is_made_again(run, sampled, folder, tmp_path):
    """In the batch that it was made in, since rounding depends on it."""
    sampled(folder, "--count", 5, "--batch-size", 2, "--steps", 2, "--out", "all")
    sampled("--like", "all/000003.png", "--out", "b.png")
    assert (tmp_path / "all/000003.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    error = "elit sample: count must be above 3, the number of the picture, got 3\n"
    assert run("sample", "--like", "all/000003.png", "--count", 3) == (2, "", error)


def test_options_beside_it_change_the_settings(sampled, folder):
    sampled(folder, "--labels", 2, "--steps", 3, "--seed", 4, "--budget", 2, "--out", "a.png")
    sampled("--like", "a.png", "--budget", "full", "--seed", 0, "--out", "b.png")
    sampled(folder, "--labels", 2, "--steps", 3, "--out", "c.png")
    assert np.array_equal(np.asarray(Image.open("b.png")), np.asarray(Image.open("c.png")))


def test_other_weights_under_the_same_name_are_refused(run, sampled, folder):
    model = opened("elit-dit", in_channels=3)
    model.save_pretrained("model")
    sampled("model", "--steps", 1, "--out", "a.png")
    with torch.no_grad():
        model.patch_embed.weight.add_(1)
    model.save_pretrained("model")
    code, _, error = run("sample", "--like", "a.png")
    assert (code, "made by other weights" in error) == (2, True)
    sampled(folder, "--like", "a.png", "--out", "b.png")  # by will


def test_what_cannot_be_repeated_is_one_line(run, tmp_path):
    Image.new("RGB", (4, 4)).save("plain.png")
    (tmp_path / "text.png").write_text("hello")
    messages = {"plain.png": "has no settings in it", "text.png": "not a picture", "missing.png": "no such file"}
    for name, message in messages.items():
        code, _, error = run("sample", "--like", name)
        assert (code, message in error, error.count("\n")) == (2, True, 1)
