"""What commands write: nothing is replaced unasked, nothing stale is left, an option that would do nothing is told."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import elit
from elit.cli.main import main
from elit.files import write_folder
from elit.models.saved import save_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model of 8×8 grey images with an interface, and one without."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("outputs")
    sizes = {"sample_size": 8, "in_channels": 1, "num_classes": 10, "hidden_size": 16, "num_heads": 1, "depth": 3}
    save_model(elit.create_model("ELIT-DiT-S/1", **sizes, split=(1, 1, 1), window=(4, 4)), folder / "model")
    save_model(elit.create_model("DiT-S/1", **sizes), folder / "plain")
    return folder


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.parametrize("out", ["grid.png", "array.npz", "folder"])
def test_a_sample_is_replaced_when_asked_to(capsys, tmp_path, saved, out):
    line = ("sample", saved / "model", "--steps", 1, "--labels", 3, "--out", out)
    assert run(capsys, *line, "--count", 3)[0] == 0
    code, said, error = run(capsys, *line)
    assert (code, said) == (2, "")
    assert (
        error == f"elit sample: cannot write out='{out}': it exists; give another name, or --overwrite to replace it\n"
    )
    assert run(capsys, *line, "--overwrite")[0] == 0
    if out == "folder":  # no stale picture is left
        assert [path.name for path in (tmp_path / "folder").iterdir()] == ["000000.png"]
    assert [path.name for path in tmp_path.iterdir()] == [out]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", "cannot write out='.': it is the current folder, or above it; give a name"),
        ("..", "cannot write out='..': it is the current folder, or above it"),
        ("dir.png", "cannot write out='dir.png': it is a folder; give the name of a file"),
        ("file", "cannot write out='file': it is a file; give the name of a folder"),
        ("file/x.png", "cannot write out='file/x.png': "),
        (
            "mine",
            "cannot write out='mine': it holds 'notes.txt', which this command has not written; give another folder",
        ),
    ],
)
def test_what_cannot_be_written_is_told_before_the_work(capsys, tmp_path, saved, monkeypatch, out, message):
    (tmp_path / "dir.png").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("elit.sampling.sample.seeded_noise", lambda *_: pytest.fail("it has begun"))
    before = sorted(tmp_path.rglob("*"))
    code, _, error = run(capsys, "sample", saved / "model", "--steps", 1, "--out", out, "--overwrite")
    assert code == 2
    assert error.startswith(f"elit sample: {message}")
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_finished_quickstart_is_not_touched(capsys, tmp_path):
    out = tmp_path / "quickstart"
    (out / "model").mkdir(parents=True)
    (out / "results.json").write_text("{}")
    code, _, error = run(capsys, "quickstart", "--out", out)
    assert code == 2
    assert error.endswith("it exists; give another name, or --overwrite to replace it\n")
    assert (out / "results.json").read_text() == "{}"
    (out / "thesis.tex").write_text("")
    code, _, error = run(capsys, "quickstart", "--out", out, "--overwrite")
    assert code == 2
    assert "holds 'thesis.tex', which this command has not written" in error


def test_a_quickstart_that_fails_leaves_the_one_before(capsys, tmp_path, monkeypatch):
    out = tmp_path / "quickstart"
    out.mkdir()
    (out / "results.json").write_text("{}")

    def fail(config):
        raise OSError("no space left")

    monkeypatch.setattr("elit.cli.quickstart.train", fail)
    monkeypatch.setattr(
        "elit.cli.quickstart.train_digit_classifier",
        lambda *_, **__: type("C", (), {"accuracy": 1, "held_out": 1})(),
    )
    assert run(capsys, "quickstart", "--out", out, "--overwrite")[0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart"]
    assert (out / "results.json").read_text() == "{}"


FILES = {
    "evaluate": "samples.npz",
    "sweep": "table.parquet",
    "loadtest": "trace.jsonl",
    "serve": "build.yaml",
    "encode": "inspect.png",
}


@pytest.mark.parametrize("command", ["import", "inspect", *FILES])
def test_every_command_asks(capsys, tmp_path, saved, command):
    out = tmp_path / FILES.get(command, "out")
    if command in FILES:
        out.write_text("{}")
    else:
        write_folder(out, lambda f: (f / "config.json").write_text("{}"))
    lines = {
        "import": ("import", "x.pt", out),
        "inspect": ("inspect", saved / "model", "--data", "digits", "--out", out),
        "evaluate": ("evaluate", saved / "model", "--detector", "digits", "--out", out),
        "sweep": ("sweep", saved / "model", "--detector", "digits", "--table", out, "--out", tmp_path / "new"),
        "loadtest": ("loadtest", "http://127.0.0.1:9", "--write-trace", out),
        "serve": ("serve", saved / "model", "--build", out),
        "encode": ("encode", "--inspect", tmp_path),
    }
    option = {"sweep": "table", "loadtest": "write_trace", "serve": "build", "encode": "inspect"}.get(command, "out")
    code, _, error = run(capsys, *lines[command])
    assert code == 2
    assert list(tmp_path.iterdir()) == [out]
    place = f"{option}='{out}'"
    assert (
        error == f"elit {command}: cannot write {place}: it exists; give another name, or --overwrite to replace it\n"
    )


def test_a_model_keeps_the_table_of_another_sweep(capsys, tmp_path, saved):
    model = shutil.copytree(saved / "model", tmp_path / "model")
    (model / "sweep.jsonl").write_text("{}\n")
    line = ("sweep", model, "--detector", "digits", "--out", tmp_path / "out")
    code, _, error = run(capsys, *line)
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith(f"elit sweep: model='{model}': '{model}/sweep.jsonl' is of another sweep than out='")
    assert error.endswith("--overwrite to replace it, or --no-card to leave it\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.jsonl").write_text("{}\n")  # its own: goes on to the next fault
    assert "metrics='fd': give a reference" in run(capsys, *line, "--metrics", "fd")[2]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that nobody can write into, whatever its mode")
@pytest.mark.parametrize("command", ["sample", "evaluate", "sweep", "encode", "train", "loadtest"])
def test_no_work_is_done_for_a_place_that_cannot_be_written(capsys, saved, command):
    model = saved / "model"
    lines = {
        "sample": (model, "--steps", 1, "--labels", 3, "--out", "/proc/x/y.png"),
        "evaluate": (model, "--detector", "digits", "--out", "/proc/x/y"),
        "sweep": (model, "--detector", "digits", "--out", "/proc/x/y"),
        "encode": (saved, "/proc/x/y", "--vae", model),
        "train": ("--out", "/proc/x/y", "--steps", 1),
        "loadtest": ("http://127.0.0.1:9", "--write-trace", "/proc/x/y.jsonl"),
    }
    code, _, error = run(capsys, command, *lines[command])
    assert (code, error.count("\n")) == (2, 1)
    assert "='/proc/x/y" in error
    assert error.startswith(f"elit {command}: cannot write ")


def test_a_folder_that_cannot_be_filled_leaves_nothing(tmp_path):
    (tmp_path / "there").mkdir()

    def fail(folder):
        (folder / "half").write_text("")
        raise OSError("full")

    for name in ("there", "new"):
        with pytest.raises(OSError, match="full"):
            write_folder(tmp_path / name, fail)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sample MODEL --scale 2", "sample: scale=2.0: goes with a guidance; add --guidance cfg, ag or ccfg"),
        (
            "sample MODEL --guidance cfg --guidance-budget 4",
            "sample: guidance_budget='4': cfg keeps the first branch's",
        ),
        ("sample MODEL --guidance-interval 0 0.5", "sample: guidance_interval=(0.0, 0.5): goes with a guidance"),
        ("sample MODEL --text-encoder t5", "sample: text_encoder='t5': this model takes classes, and no text"),
        ("sample MODEL --guidance ag --guidance-budget 16", "sample: guidance ag: its budget 16 is the main branch's"),
        (
            "sample MODEL --guidance cfg --guidance-interval 0.1 0.2 --steps 4",
            "sample: guidance interval=(0.1, 0.2): no step falls into it; steps begin at t = 0, 0.25, 0.5, 0.75",
        ),
        ("evaluate MODEL --detector digits --scale 2", "evaluate: scale=2.0: goes with a guidance"),
        ("sweep MODEL --guidance none --scales 2", "sweep: scales=(2.0,): goes with a guidance"),
        ("sweep MODEL --guidance none cfg --guidance-budget 2", "sweep: guidance_budget='2': cfg keeps the first"),
        ("inspect MODEL --data digits --scale 2", "inspect: scale=2.0: goes with a guidance"),
        ("sample MODEL --guidance cfg --scale inf", "sample: scale must be finite, got inf"),
        ("sample MODEL --device meta", "sample: device must be usable on this machine, got 'meta'"),
        ("sample MODEL --sample-budgets 8 4 --count 3", "sample: sample_budgets must be one a sample, got 2 for 3"),
        ("sample MODEL --step-budgets 8 4 --budget 8", "sample: cannot take budget and step_budgets at once"),
    ],
)
def test_an_option_that_does_nothing_is_told(capsys, tmp_path, saved, line, message):
    code, _, error = run(capsys, *line.replace("MODEL", str(saved / "model")).split())
    assert code == 2
    assert error.startswith(f"elit {message}")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_budget_an_image(capsys, saved):
    line = ("sample", saved / "model", "--steps", 2, "--guidance", "ccfg")
    assert run(capsys, *line, "--sample-budgets", "100%", 4, 1, "--out", "three.png")[1].startswith(
        "three.png: 3 images"
    )
    assert run(capsys, *line, "--step-budgets", "50%", 16, "--out", "steps.png")[0] == 0
    assert Image.open("three.png").size == (2 * 66 - 2, 2 * 66 - 2)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--guidance", "cfg", "--scale", "1e300"), 1, "the samples are not finite; give a smaller scale"),
        (("--steps", "99999999999999"), 2, "steps=99999999999999: give at most 10,000,000"),
        (("--count", "99999999999999"), 2, "count=99999999999999: give at most 10,000,000"),
    ],
)
def test_numbers_beyond_all_sense(capsys, tmp_path, saved, options, code, message):
    steps = () if "--steps" in options else ("--steps", 2)
    result, _, error = run(capsys, "sample", saved / "model", *steps, *options)
    assert (result, error.count("\n")) == (code, 1)
    assert message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", ["sample fashion --out {}/a.png", "encode --inspect {} --vae x", "train --out {}/run"])
def test_a_name_that_is_too_long_is_bad_input_wherever_it_stands(line, capsys):
    assert main(line.format("x" * 300).split()) == 2
    error = capsys.readouterr().err
    assert "File name too long" in error
    assert error.count("\n") == 1
