"""elit profile, elit sample with a target, and elit inspect, as a user types them; and their mistakes."""

import json
import shutil

import pytest

import elit.cli.sample

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("empty_folder")]


def test_a_profile_then_a_plan(run, models, tmp_path):
    shutil.copytree(models / "model", "model")
    code, said, _ = run("profile", "model", "--seconds", 0, "--batch-sizes", 1, 2)
    assert (code, "held out" in said, "Mean error:" in said) == (0, True, True)
    (path,) = (tmp_path / "model").glob("profile-*.json")
    assert f"Profile: model/{path.name}" in said
    line = ("sample", "model", "--labels", 3, 7, "--overwrite")
    code, said, noted = run(*line, "--target-ms", 500)
    assert (code, noted, "ms for 2 images" in said, "elit sweep MODEL" in said) == (0, "", True, True)
    result = json.loads(run(*line, "--target-gflops", 0.01, "--json")[1].splitlines()[-1])
    assert result["gflops_per_image"] <= 0.01
    assert result["plan"]["words"]
    code, _, error = run(*line, "--target-ms", 0.0001)
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith("elit sample: target_ms=0.0001: the least possible here is")


def test_without_a_profile_a_target_measures_first(run, models, monkeypatch):
    shutil.copytree(models / "plain", "plain")
    measured = elit.cli.sample.measured
    monkeypatch.setattr(elit.cli.sample, "measured", lambda *a, **o: measured(*a, **o | {"seconds": 0}))
    line = ("sample", "plain", "--labels", 3, "--overwrite", "--target-images-per-s", 0.4)
    code, said, noted = run(*line)
    assert (code, "cfg 1.25" in said) == (0, True)
    assert noted == "elit sample: note: no profile of this machine yet; measuring for half a minute\n"
    assert run(*line)[2] == ""


@pytest.mark.parametrize(("name", "data"), [("text", "digits"), ("clips", "moving-digits"), ("model", "samples")])
def test_inspect_writes_what_it_says(run, models, tmp_path, name, data):
    options = "--count 4 --draws 1 --times 0.5 --steps 1 --out inside --guidance ccfg --json"
    said = json.loads(run("inspect", models / name, "--data", data, *options.split())[1].splitlines()[-1])
    assert said == json.loads((tmp_path / "inside/inspect.json").read_text())
    assert (said["made"]["model"]["folder"], said["made"]["examples"]["data"]) == (str(models / name), data)
    assert said["made"]["pictures"]
    assert not list(tmp_path.rglob(".*"))
