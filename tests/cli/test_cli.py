"""The commands as a user types them, mistakes included."""

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import opened, small_vae
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

import elit
from elit.cli.doctor import EXTRAS
from elit.cli.main import COMMANDS, main
from elit.models.saved import save_model
from elit.sampling.pipeline import ElitPipeline


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """A saved model of 8×8 grey images."""
    torch.manual_seed(0)
    settings = {"hidden_size": 16, "num_heads": 1, "depth": 3, "split": (1, 1, 1), "window": (4, 4)}
    model = elit.create_model("ELIT-DiT-S/1", sample_size=8, in_channels=1, num_classes=10, **settings)
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A saved model of 8×8 grey images that takes text."""
    settings = {"hidden_size": 16, "num_heads": 1, "depth": 3, "split": (1, 1, 1), "window": (4, 4)}
    words = {"text_features": 16, "pooled_features": 16, "text_length": 12}
    folder = tmp_path_factory.mktemp("saved") / "text"
    save_model(elit.create_model("ELIT-MM-DiT-S/1", sample_size=8, in_channels=1, **settings, **words), folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A saved model of clips of 2 grey frames of 8×8."""
    settings = {"hidden_size": 16, "num_heads": 1, "depth": 3, "split": (1, 1, 1), "window": (1, 4, 4)}
    folder = tmp_path_factory.mktemp("saved") / "clips"
    save_model(elit.create_model("ELIT-DiT-S/1-Video", sample_size=(2, 8, 8), in_channels=1, **settings), folder)
    return folder


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(capsys, *arguments):
    """Exit code, stdout and stderr of a command."""
    code = main([str(argument) for argument in arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.slow
def test_help_is_fast_and_names_every_command():
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "elit", "--help"], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 1
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example(capsys, name):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"Example: elit {name}" in text
    assert "--json" in text
    assert "default" in text or name == "doctor"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("smaple", "elit: unknown command 'smaple'; did you mean 'sample'?"),
        ("sample", "elit sample: "),
        ("sample nothing", "elit sample: model='nothing': no such folder"),
        ("sample MODEL --budget 17", "elit sample: budget must be a number of latents per group (1 to 16)"),
        ("sample MODEL --budget 0", "elit sample: budget must be"),
        ("sample MODEL --budget 1.5", "elit sample: budget must be"),
        ("sample MODEL --budget x", "elit sample: budget must be"),
        ("sample MODEL --labels 11", "elit sample: labels=11: labels are 0 to 9"),
        ("sample MODEL --steps many", "elit sample: "),
        ("sample MODEL --guidance pcfg", "elit sample: "),
        ("sample MODEL --guidance ccfg --guidance-budget 99", "elit sample: budget must be"),
        ("sample MODEL --guidance-interval 0.5 1.5 --guidance cfg", "elit sample: guidance_interval=0.5 1.5: need"),
        ("sample MODEL --out x.bmp", "elit sample: out='x.bmp'"),
        ("sample MODEL --count 0", "elit sample: count=0"),
        ("sample MODEL --vae nothing", "elit sample: vae='nothing': no such folder"),
        ("sample MODEL --device nowhere", "elit sample: device must be usable on this machine, got 'nowhere'"),
        ("sample MODEL --wrong 1", "elit sample: "),
        ("flops ELIT-DiT-XXL/2", "elit flops: unknown model 'ELIT-DiT-XXL/2'; close names"),
        ("flops ELIT-DiT-XL/2 --budgets 2.0", "elit flops: budget must be"),
        (
            "flops --paper --budgets 50%",
            "elit flops: cannot take budgets with --paper: its figures are of the paper's networks",
        ),
        ("flops ELIT-DiT-XL/2 --sample-size 35", "elit flops: sample_size=(35, 35)"),
        ("train --config nothing.yaml", "elit train: config='nothing.yaml': no such file"),
        ("train --steps 0", "elit train: steps must be at least 1, got 0"),
        ("train --data nothing", "elit train: cannot read 'nothing': no such file or folder"),
        ("train --model.name ELIT-DiT-M/1", "elit train: unknown model 'ELIT-DiT-M/1'"),
        ("sample MODEL --prompts seven", "elit sample: prompts='seven': this model takes classes; give labels"),
        ("sample TEXT", "elit sample: prompts: none given; this model takes text"),
        ("sample TEXT --labels 3", "elit sample: labels=3: this model takes text; give prompts"),
        (
            "sample TEXT --prompts aaaaaaaaaaaaa",
            "elit sample: prompt='aaaaaaaaaaaaa': longer than this model's text_length=12",
        ),
        (
            "sample CLIPS --out clips.mp4",
            "elit sample: out='clips.mp4': give a .png, .jpg, .jpeg, .webp, .gif for pictures, a .npz",
        ),
        (
            "flops ELIT-HDiT-XL/2 --budgets 6",
            "elit flops: budget must be a number of latents per group (4 to 16 in steps",
        ),
        (
            "train --model.name MM-DiT-S/1 --model.num-classes 3",
            "elit train: MM-DiT-S/1: unknown setting 'num_classes'",
        ),
        ("evaluate", "elit evaluate: "),
        ("evaluate MODEL --count 1", "elit evaluate: count=1: give at least 2"),
        ("evaluate MODEL --detector fid", "elit evaluate: detector='fid': give one of inception, dinov2"),
        (
            "evaluate MODEL --detector digits --budget 17",
            "elit evaluate: budget must be a number of latents per group",
        ),
        ("evaluate MODEL --detector digits --metrics fid", "elit evaluate: metrics='fid': digits offers fd, accuracy"),
        ("evaluate MODEL --detector digits --reference x", "elit evaluate: cannot read 'x': no such file or folder"),
        ("evaluate nothing --detector digits", "elit evaluate: pictures='nothing': no such file or folder"),
        ("quickstart --backbone sit", "elit quickstart: "),
        ("quickstart --steps x", "elit quickstart: "),
        ("quickstart --steps 0", "elit quickstart: steps=0"),
        ("quickstart --seed 9223372036854775808", "elit quickstart: seed"),
    ],
)
@pytest.mark.usefixtures("digit_classifiers")
def test_bad_input_is_one_line_and_exit_code_2(capsys, tmp_path, pixels, text, clips, line, message):
    line = line.replace("MODEL", str(pixels)).replace("TEXT", str(text)).replace("CLIPS", str(clips))
    code, out, err = run(capsys, *line.split())
    assert code == 2
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert len(err) < 400
    assert out == ""
    assert not list(tmp_path.iterdir())


def test_parse_errors_say_what_is_valid(capsys, pixels):
    assert "('none', 'cfg', 'ag', 'ccfg')" in run(capsys, "sample", pixels, "--guidance", "pcfg")[2]
    assert "labels='a': this model has no class names" in run(capsys, "sample", pixels, "--labels", "a")[2]
    assert "--wrong" in run(capsys, "sample", pixels, "--wrong", "1")[2]
    assert "model" in run(capsys, "sample")[2].lower()


def test_sample_draws_prompts(capsys, text):
    code, out, _ = run(capsys, "sample", text, "--prompts", "a one", "a six", "--count", "4", "--steps", "2")
    assert (code, Image.open("samples.png").size) == (0, (2 * 66 - 2, 2 * 66 - 2))
    assert out.startswith("samples.png: 4 images, ")


def test_sample_writes_clips_as_strips_animation_array_and_folder(capsys, clips):
    options = ("--steps", "1", "--labels", "3", "7", "--guidance", "ccfg")
    for out in ("strips.png", "moving.gif", "array.npz", "folder"):
        code, said, _ = run(capsys, "sample", clips, *options, "--out", out)
        assert (code, said.split(",")[0]) == (0, f"{out}: 2 clips")
    assert Image.open("strips.png").size == (8 * 17, 2 * 66 - 2)  # two frames and a gap, eight times as large
    with Image.open("moving.gif") as animation, Image.open("folder/000001.gif") as single:
        assert (animation.n_frames, animation.size) == (2, (2 * 66 - 2, 64))
        assert (single.n_frames, single.size) == (2, (8, 8))
    assert np.load("array.npz")["arr_0"].shape == (2, 2, 8, 8, 3)


def test_flops_prints_the_papers_figures(capsys):
    code, out, _ = run(capsys, "flops", "--paper", "--json")
    rows = json.loads(out.splitlines()[-1])
    assert code == 0
    assert all(list(row) == ["row", "paper", "ours", "difference"] for row in rows)
    assert all(abs(row["difference"]) <= 0.025 for row in rows)
    code, out, _ = run(capsys, "flops", "--paper")
    assert "ELIT-U-ViT-XL/2 MB, 512px" in out


def test_sample_writes_a_grid_an_array_and_a_folder(capsys, pixels):
    options = ("--steps", "2", "--labels", "3", "7", "--count", "5", "--batch-size", "2")
    for out in ("grid.png", "array.npz", "folder"):
        code, text, _ = run(capsys, "sample", pixels, *options, "--out", out, "--budget", "0.5")
        assert code == 0
        assert text.startswith(f"{out}: 5 images, ")
    assert Image.open("grid.png").size == (3 * 66 - 2, 2 * 66 - 2)
    assert np.load("array.npz")["arr_0"].shape == (5, 8, 8, 3)
    assert len(os.listdir("folder")) == 5


def test_json_comes_last_on_stdout(capsys, pixels):
    code, out, _ = run(
        capsys, *("sample", pixels, "--steps", "2", "--json", "--guidance", "ccfg", "--budget", "4@0-0.5,1.0@0.5-1")
    )
    result = json.loads(out.splitlines()[-1])
    assert code == 0
    assert result["count"] == 10
    model = elit.load_model(pixels)
    cost = {budget: elit.count_flops(model, budget=budget) for budget in (1, 4, 16)}
    assert result["gflops_per_image"] == pytest.approx((cost[4] + cost[16] + 2 * cost[1]) / 1e9)


def test_sample_without_an_autoencoder_keeps_latents(capsys, tmp_path):
    save_model(opened("elit-dit"), tmp_path / "m")
    assert run(capsys, "sample", "m", "--steps", "1", "--out", "x.npz")[0] == 0
    assert np.load("x.npz")["arr_0"].shape == (5, 4, 16, 16)
    code, _, err = run(capsys, "sample", "m", "--steps", "1")
    assert code == 2
    assert "no pictures" in err
    assert not os.path.exists("samples.png")


def test_sample_decodes_with_a_pipelines_autoencoder(capsys, tmp_path):
    ElitPipeline(opened("elit-dit"), FlowMatchEulerDiscreteScheduler(), small_vae()).save_pretrained(tmp_path / "pipe")
    code, _, _ = run(capsys, "sample", "pipe", "--steps", "1", "--labels", "0", "1", "--dtype", "bfloat16")
    assert code == 0
    assert Image.open("samples.png").size == (2 * 64 + 2, 64)
    save_model(opened("elit-dit"), tmp_path / "model")
    assert run(capsys, "sample", "model", "--steps", "1", "--vae", "pipe/vae", "--out", "x.npz")[0] == 0
    assert np.load("x.npz")["arr_0"].shape == (5, 32, 32, 3)


def test_flops_of_presets_and_of_saved_models(capsys, pixels):
    code, out, _ = run(capsys, "flops", "DiT-XL/2", "ELIT-DiT-XL/2", "--sample-size", "64", "--json")
    rows = json.loads(out.splitlines()[-1])
    assert code == 0
    by_budget = {(row["model"], row["budget"]): row for row in rows}
    assert by_budget["DiT-XL/2", None]["training_tflops"] == pytest.approx(806, rel=0.015)
    assert by_budget["ELIT-DiT-XL/2", 1.0]["training_tflops"] == pytest.approx(831, rel=0.015)
    assert by_budget["ELIT-DiT-XL/2", 0.25]["tokens_per_group"] == 16
    code, out, _ = run(capsys, "flops", pixels, "--measure", "--batch-size", "2")
    assert code == 0
    assert "ms/sample" in out


def test_train_from_options_and_from_a_file(capsys):
    model = "--model.hidden-size 16 --model.num-heads 1 --model.depth 3 --model.window 4 4 --model.split 1 1 1"
    options = f"train --model.name ELIT-DiT-S/1 {model} --steps 3 --batch-size 4 --preview-every 0"
    code, out, _ = run(capsys, *options.split(), "--out", "a", "--json")
    assert code == 0
    assert json.loads(out.splitlines()[-1]) == {"model": "a/model", "steps": 3}
    assert run(capsys, "train", "--config", "a/config.yaml", "--out", "b", "--steps", "2")[0] == 0
    assert elit.load_model("b/model").spec.split == (1, 1, 1)
    code, _, err = run(capsys, "train", "--config", "a/config.yaml")
    assert code == 2
    assert "holds a run at step 3" in err


def test_doctor(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    findings = json.loads(out.splitlines()[-1])
    assert code == 0
    assert findings["versions"]["torch"]
    assert findings["matmul_gflops"]["cpu"]["float32"] > 0
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "problems:" in out


def test_doctor_names_a_broken_torchvision_and_its_cure(capsys, tmp_path, monkeypatch):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "operator nms does not exist" in out
    assert "Cure: pip uninstall torchvision" in out


def test_doctor_names_the_extras_of_the_package_and_no_other():
    content = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    extras = content["project"]["optional-dependencies"]
    assert {name.split()[0] for name in EXTRAS} == set(extras) - {"dev"}
    requirements = [re.split("[<>=]", line)[0] for line in content["project"]["dependencies"]]
    assert len(requirements) == len(set(requirements))
