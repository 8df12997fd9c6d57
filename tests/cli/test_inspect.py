"""`elit inspect`: pictures, numbers and tables."""

import json

import pytest
import torch
from conftest import SAVED, TINY
from PIL import Image

import elit
from elit.cli.main import main
from elit.models.saved import save_model

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


def test_it_prints_tables_and_reads_a_folder(models, tmp_path, capsys):
    for i in range(4):
        (tmp_path / f"data/{i}").mkdir(parents=True)
        Image.new("RGB", (9, 9), (60 * i, 0, 0)).save(tmp_path / f"data/{i}/0.png")
    torch.manual_seed(0)
    name, settings = SAVED["model"]
    save_model(elit.create_model(name, **TINY | settings | {"in_channels": 3}), tmp_path / "colours")
    assert main(["inspect", "colours", "--data", "data", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "Rank correlation of Read attention and loss" in out
    assert "Loss at every budget" in out
    assert out.splitlines()[-1] == "Pictures: inside"
