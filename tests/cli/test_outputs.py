"""Outputs of commands: nothing is replaced unasked, nothing stale is left, an option that would do nothing is told."""

import shutil

import pytest

from elit.files import write_folder, write_text

pytestmark = pytest.mark.usefixtures("empty_folder")


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
