"""Commands as users type them: help, outputs, pictures of every kind, and one line for bad input."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import SAVED, opened
from PIL import Image

import elit
from elit.cli.main import COMMANDS, FIRST, main
from elit.files import write_folder, write_text
from elit.models.saved import save_model
from elit.sampling.pictures import read_text

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example(capsys, name):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    text = capsys.readouterr().out
    assert all(part in text for part in (f"Example: elit {name}", "--json", "default"))


def test_a_name_that_is_no_command_has_a_hint(run):
    assert all(name in run(*words)[1] for name in COMMANDS for words in ([], ["--help"]))
    assert re.findall(r"^  (\S+)  ", run()[1], flags=re.MULTILINE) == list(FIRST)
    code, out, err = run("SMAPLE")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("elit: unknown command 'SMAPLE'; did you mean 'sample'? commands: quickstart, ")


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("train --model DiT-S/2", "--model.name"),
        ("train --lr 1e-3", "--learning-rate"),
        ("train --epochs 3", "--steps"),
        ("train --bath-size 3", "--batch-size"),
        ("distill a b --lr 1", "--learning-rate"),
        ("sample fashion --guidance-scale 2", "--scale"),
        ("sample fashion --label 2", "--labels"),
        ("distill a b --teacher-step 9", "--teacher-steps"),
    ],
)
def test_an_option_that_is_none_has_a_hint(run, line, meant):
    code, out, err = run(*line.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"did you mean {meant}? (see elit {line.split()[0]} --help)" in err


def test_a_shell_completes_all_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--tyro-print-completion", "bash"])
    assert stop.value.code in (0, None)
    script = capsys.readouterr().out
    assert "complete -F _tyro_elit elit" in script
    assert all(name in script for name in (*COMMANDS, "--guidance-interval", "--model.num-heads"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --data WRONG", "data must be a folder, a file or one of digits, "),
        ("distill nothing out --data WRONG", "data must be a folder"),
        ("sample MODEL --budget 17", "budget must be a number of latents per window (1 to 16)"),
        ("sample MODEL --step-budgets 8 4 --budget 8", "step_budgets"),
        ("sample MODEL --guidance ccfg --guidance-budget 99", "got 99"),
        ("sample MODEL --text-encoder t5", "text_encoder"),
        ("sample MODEL --out x.bmp", "'x.bmp'"),
        ("sample MODEL --device nowhere", "device must be usable on this machine, got 'nowhere'"),
        ("sample MODEL --target-ms 100 --target-gflops 1", "target_ms, target_gflops given; give one of"),
        ("sample MODEL --target-ms 100 --steps 8", "cannot use steps with a target"),
        (f"sample fashion --out {'x' * 300}/a.png", "File name too long"),
        ("flops ELIT-HDiT-S/2 --budgets 6", "(4 to 16 in steps of 4)"),
        ("train --config recipe:imagenet-256/elit-dit-xxl", "config must be a recipe that elit recipes lists"),
        ("train --model.sample-size 9 --dry-run", "sample_size"),
        ("distill nothing out --prompts nothing.txt", "nothing"),
        ("encode nowhere out --vae a/v", "'nowhere'"),
        ("evaluate", "Missing"),
        ("evaluate MODEL --detector fid", "'fid'"),
        ("inspect PLAIN --data digits", "Read"),
        ("inspect TEXT", "samples"),
        ("inspect FEW --data digits", "y must be labels 0 to "),
    ],
)
@pytest.mark.usefixtures("digit_classifiers")
def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, models, line, message):
    words = [str(models / word.lower()) if word.isupper() else word for word in line.split()]
    code, out, err = run(*words)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith(f"elit {words[0]}: ")
    assert message in err
    assert len(err) < 700
    assert not list(tmp_path.iterdir())


def test_flops_of_presets_and_of_saved_models(run, models):
    code, out, _ = run("flops", "DiT-XL/2", "ELIT-DiT-XL/2", "--sample-size", "64", "--json")
    rows = {(row["model"], row["budget"]): row for row in json.loads(out.splitlines()[-1])}
    assert code == 0
    assert rows["DiT-XL/2", None]["training_tflops"] == pytest.approx(806, rel=0.015)
    assert rows["ELIT-DiT-XL/2", 1.0]["training_tflops"] == pytest.approx(831, rel=0.015)
    assert rows["ELIT-DiT-XL/2", 0.25]["tokens_per_group"] == 16
    assert run("flops", models / "model")[0] == 0
    rows = json.loads(run("flops", "--paper", "--json")[1].splitlines()[-1])
    assert "ELIT-U-ViT-XL/2 MB, 512px, training TFLOPs" in {row["row"] for row in rows}
    assert all(abs(row["difference"]) <= 0.025 for row in rows)


def test_train_from_options_and_from_a_file(run):
    model = "--model.hidden-size 16 --model.num-heads 1 --model.depth 3 --model.window 4 4 --model.split 1 1 1"
    short = "--steps 3 --batch-size 4 --preview-every 0"
    code, out, _ = run(*f"train --model.name ELIT-DiT-S/1 {model} {short} --out a --json".split())
    assert (code, json.loads(out.splitlines()[-1])) == (0, {"model": "a/model", "steps": 3})
    assert run("train", "--config", "a/config.yaml", "--out", "b", "--steps", "2")[0] == 0
    assert elit.load_model("b/model").spec.split == (1, 1, 1)
    code, _, error = run("train", "--config", "a/config.yaml")
    assert (code, "holds a run at step 3" in error) == (2, True)


def test_doctor(run, tmp_path, monkeypatch):
    findings = json.loads(run("doctor", "--json")[1].splitlines()[-1])
    assert findings["versions"]["torch"]
    assert "cores" in findings["devices"]["cpu"]
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    code, out, _ = run("doctor")
    assert (code, "operator nms does not exist" in out, "pip uninstall torchvision" in out) == (0, True, True)


@pytest.mark.parametrize("out", ["grid.png", "array.npz", "folder"])
def test_a_sample_is_replaced_when_asked_to(run, tmp_path, models, out):
    line = ("sample", models / "model", "--steps", 1, "--labels", 3, "--out", out)
    assert run(*line, "--count", 3)[0] == 0
    code, said, error = run(*line)
    assert (code, said) == (2, "")
    assert error.endswith(f"write out='{out}': it exists; give another name, or --overwrite to replace it\n")
    assert run(*line, "--overwrite")[0] == 0
    if out == "folder":  # no stale picture is left
        assert [path.name for path in (tmp_path / "folder").iterdir()] == ["000000.png"]
    assert [path.name for path in tmp_path.iterdir()] == [out]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", "cannot write out='.': it is the current folder, or above it; give a name"),
        ("dir.png", "cannot write out='dir.png': it is a folder; give the name of a file"),
        ("file", "cannot write out='file': it is a file; give the name of a folder"),
        ("mine", "cannot write out='mine': it holds 'notes.txt', which this command has not written; give another"),
    ],
)
def test_what_cannot_be_written_is_told_before_the_work(run, tmp_path, models, monkeypatch, out, message):
    (tmp_path / "dir.png").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("elit.sampling.engine.seeded_noise", lambda *_: pytest.fail("it has begun"))
    before = sorted(tmp_path.rglob("*"))
    code, _, error = run("sample", models / "model", "--steps", 1, "--out", out, "--overwrite")
    assert code == 2
    assert error.startswith(f"elit sample: {message}")
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_quickstart_that_is_refused_or_fails_leaves_the_one_before(run, tmp_path, monkeypatch):
    def fail(out, args):
        raise OSError("no space left")

    out = tmp_path / "quickstart"
    write_text(out / "results.json", "{}")
    monkeypatch.setattr("elit.cli.quickstart.run_into", fail)
    assert run("quickstart", "--out", out, "--overwrite")[0] == 1
    write_text(out / "thesis.tex", "")
    error = run("quickstart", "--out", out, "--overwrite")[2]
    assert error.endswith("it holds 'thesis.tex', which this command has not written; give another folder\n")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["quickstart", "results.json", "thesis.tex"]


LINES = {
    "import": "x.pt out",
    "inspect": "MODEL --data digits --out out",
    "evaluate": "MODEL --detector digits --out samples.npz",
    "serve": "MODEL --build build.yaml",
    "encode": "--inspect .",
}


@pytest.mark.parametrize(("command", "line"), LINES.items(), ids=LINES)
def test_every_command_asks(run, tmp_path, models, command, line):
    option, name = {"serve": ("build", "build.yaml"), "encode": ("inspect", "inspect.png")}.get(
        command, ("out", line.split()[-1])
    )
    if "." in name:
        write_text(tmp_path / name, "{}")
    else:
        write_folder(tmp_path / name, lambda f: (f / "config.json").write_text("{}"))
    code, _, error = run(command, *line.replace("MODEL", str(models / "model")).split())
    assert code == 2
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert error.startswith(f"elit {command}: cannot write {option}='{name}': it exists; give another name, or --over")


@pytest.mark.usefixtures("digit_classifiers")
def test_a_model_keeps_the_table_of_another_sweep(run, tmp_path, models):
    model = shutil.copytree(models / "model", tmp_path / "model")
    (model / "sweep.jsonl").write_text("{}\n")
    line = ("sweep", model, "--detector", "digits", "--out", tmp_path / "out")
    code, _, error = run(*line)
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith(f"elit sweep: cannot replace '{model}/sweep.jsonl'")
    assert "--overwrite" in error
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.jsonl").write_text("{}\n")  # its own: goes on to the next fault
    assert "metrics='fd': give a reference" in run(*line, "--metrics", "fd")[2]


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


def test_samples_that_are_not_finite_are_a_failed_run(run, models, tmp_path):
    line = ("sample", models / "model", "--steps", 2, "--guidance", "cfg", "--scale", "1e300")
    code, _, error = run(*line)
    assert (code, error.count("\n")) == (1, 1)
    assert "the samples are not finite: give a smaller scale" in error
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    saved = tmp_path_factory.mktemp("like") / "model"
    opened("elit-dit", in_channels=3).save_pretrained(saved)
    return saved


@pytest.fixture
def sampled(run):
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
