"""elit profile and elit sample with a target as a user types them; and their mistakes."""

import json

import pytest
import torch

import elit
from elit.cli.main import main
from elit.models.saved import save_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("digit_classifiers")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a model of 8×8 digits, and one without an interface."""
    folder = tmp_path_factory.mktemp("planner")
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 1, "num_classes": 10, "hidden_size": 16, "num_heads": 1, "depth": 3}
    save_model(elit.create_model("ELIT-DiT-S/1", **sizes, split=(1, 1, 1), window=(4, 4)), folder / "model")
    save_model(elit.create_model("DiT-S/1", **sizes), folder / "plain")
    return folder


@pytest.fixture(autouse=True)
def _there(workplace, monkeypatch):
    monkeypatch.chdir(workplace)


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_a_profile_then_a_plan(capsys, workplace):
    code, said, _ = run(capsys, "profile", "model", "--seconds", 0, "--batch-sizes", 1, 2)
    assert code == 0
    assert "held out" in said
    assert "Mean error:" in said
    (path,) = (workplace / "model").glob("profile-*.json")
    assert f"Profile: model/{path.name}" in said

    line = ("sample", "model", "--labels", 3, 7, "--target-ms", 500, "--out", "planned.png")
    code, said, noted = run(capsys, *line)
    assert (code, noted) == (0, "")
    assert "steps, " in said
    assert "ms for 2 images" in said
    assert "elit sweep MODEL" in said
    assert (workplace / "planned.png").is_file()
    code, said, _ = run(capsys, *line[:5], "--target-gflops", 0.01, "--out", "again.png", "--json")
    result = json.loads(said.splitlines()[-1])
    assert result["gflops_per_image"] <= 0.01
    assert result["plan"]["words"]


def test_without_a_profile_a_target_measures_first(capsys, workplace, monkeypatch):
    import elit.cli.sample

    measured = elit.cli.sample.measured
    monkeypatch.setattr(elit.cli.sample, "measured", lambda *a, **o: measured(*a, **o | {"seconds": 0}))
    for path in (workplace / "plain").glob("profile-*"):
        path.unlink()
    line = ("sample", "plain", "--labels", 3, "--overwrite", "--target-images-per-s", 0.4, "--out", "plain.png")
    code, said, noted = run(capsys, *line)
    assert code == 0
    assert noted == "elit sample: note: no profile of this machine yet; measuring for half a minute\n"
    assert "cfg 1.25" in said
    assert run(capsys, *line, "--overwrite")[2] == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("profile nothing", "model must be a folder that save_pretrained wrote, got 'nothing'"),
        ("profile model --batch-sizes 0", "batch_sizes must be at least 1, got 0"),
        ("sample model --target-ms 0.0001", "target_ms=0.0001: the least possible here is"),
        ("sample model --target-gflops -1", "target_gflops"),
        ("sample model --target-ms 100 --target-gflops 1", "target_ms, target_gflops given; give one of"),
        ("sample model --target-ms 100 --steps 8", "cannot use steps with a target"),
        ("sample model --target-gflops 1 --budget 0.5", "cannot use budget with a target"),
    ],
)
def test_mistakes_are_one_line(capsys, workplace, line, message):
    if "target-ms" in line and not list((workplace / "model").glob("profile-*")):
        run(capsys, "profile", "model", "--seconds", 0, "--batch-sizes", 1)
    code, _, error = run(capsys, *line.split())
    assert code == 2
    assert error.startswith(f"elit {line.split()[0]}: {message}")
    assert error.count("\n") == 1


def test_an_impossible_target_is_refused_before_anything_is_measured(capsys, workplace, monkeypatch):
    monkeypatch.setattr("elit.cli.sample.measured", lambda *_, **__: pytest.fail("it is measured"))
    for path in (workplace / "plain").glob("profile-*"):
        path.unlink()
    code, _, error = run(capsys, "sample", "plain", "--labels", 3, "--target-ms", 0.001, "--out", "none.png")
    assert code == 2
    assert error.startswith("elit sample: target_ms=0.001: the least possible here is ")
    assert error.count("\n") == 1
