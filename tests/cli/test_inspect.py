"""`elit inspect`: pictures, numbers and tables."""

import json

import pytest

from elit.cli.main import main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("empty_folder")]

QUICK = ("--count", "4", "--draws", "1", "--times", "0.5", "--steps", "1", "--out", "inside")


@pytest.mark.parametrize(("name", "data"), [("text", "digits"), ("clips", "moving-digits"), ("model", "samples")])
def test_it_writes_numbers(models, tmp_path, capsys, name, data):
    assert main(["inspect", str(models / name), "--data", data, *QUICK, "--guidance", "ccfg", "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said == json.loads((tmp_path / "inside/inspect.json").read_text())
    assert said["made"]["model"]["folder"] == str(models / name)
    assert said["made"]["examples"]["data"] == data
    assert said["made"]["pictures"]
    assert not list(tmp_path.rglob(".*"))
