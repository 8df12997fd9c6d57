"""`elit inspect` as a user types it, mistakes included."""

import json

import pytest
import torch
from PIL import Image

import elit
from elit.cli.main import main
from elit.models.saved import save_model

pytestmark = pytest.mark.slow

SIZES = {"hidden_size": 16, "num_heads": 1, "depth": 3}
ELIT = {"split": (1, 1, 1), "window": (4, 4), "num_latents": 4}
NETWORKS = {
    "pixels": ("ELIT-DiT-S/1", {"sample_size": 8, "num_classes": 10} | ELIT),
    "plain": ("DiT-S/1", {"sample_size": 8, "num_classes": 10}),
    "few": ("ELIT-DiT-S/1", {"sample_size": 8, "num_classes": 5} | ELIT),
    "text": (
        "ELIT-MM-DiT-S/1",
        {"sample_size": 8, "text_length": 24, "text_features": 16, "pooled_features": 16} | ELIT,
    ),
    "clips": ("ELIT-DiT-S/1-Video", {"sample_size": (4, 8, 12)} | ELIT | {"window": (2, 2, 3)}),
}
QUICK = ("--count", "4", "--draws", "1", "--times", "0.5", "--steps", "1", "--out", "inside")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of small saved models, by name."""
    root = tmp_path_factory.mktemp("saved")
    for name, (preset, settings) in NETWORKS.items():
        torch.manual_seed(0)
        save_model(elit.create_model(preset, in_channels=1, **SIZES, **settings), root / name)
    return root


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("name", "data"), [("text", "digits"), ("clips", "moving-digits"), ("pixels", "samples")])
def test_it_writes_a_page_and_numbers(models, tmp_path, capsys, name, data):
    assert main(["inspect", str(models / name), "--data", data, *QUICK, "--guidance", "ccfg", "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said == json.loads((tmp_path / "inside/inspect.json").read_text())
    assert said["made"]["model"]["folder"] == str(models / name)
    assert said["made"]["examples"]["data"] == data
    assert said["made"]["pictures"]
    page = (tmp_path / "inside/report.html").read_text()
    assert ("Of clips the first frame is shown" in page) == (name == "clips")
    assert not list(tmp_path.rglob(".*"))


def test_it_prints_tables_and_looks_at_a_folder(models, tmp_path, capsys):
    for i in range(4):
        (tmp_path / f"data/{i}").mkdir(parents=True)
        Image.new("RGB", (9, 9), (60 * i, 0, 0)).save(tmp_path / f"data/{i}/0.png")
    torch.manual_seed(0)
    name, settings = NETWORKS["pixels"]
    save_model(elit.create_model(name, in_channels=3, **SIZES, **settings), tmp_path / "colours")
    assert main(["inspect", "colours", "--data", "data", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "Rank correlation of Read attention and loss" in out
    assert out.splitlines()[-1] == "Report: inside/report.html"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("inspect", "elit inspect: "),
        ("inspect MODELS/text", "elit inspect: data='samples' is not supported for a model that takes text"),
        ("inspect nothing --data digits", "elit inspect: model='nothing': no such folder"),
        (
            "inspect MODELS/plain --data digits",
            "elit inspect: cannot inspect a baseline",
        ),
        ("inspect MODELS/pixels --data nothing", "elit inspect: data must be a folder, a file or one of"),
        (
            "inspect MODELS/pixels --data moving-digits",
            "elit inspect: data='moving-digits' must have samples of",
        ),
        ("inspect MODELS/few --data digits", "elit inspect: y="),
        ("inspect MODELS/pixels --data digits --count 1", "elit inspect: count must be at least 2, got 1"),
        (
            "inspect MODELS/pixels --data digits --count 2000",
            "elit inspect: count must be at most 1797",
        ),
        ("inspect MODELS/pixels --data digits --times 1.5", "elit inspect: times must be at least one in [0, 1]"),
        ("inspect MODELS/pixels --data digits --draws 0", "elit inspect: draws must be at least 1, got 0"),
        ("inspect MODELS/pixels --data digits --image-size 0", "elit inspect: image_size must be at least 1, got 0"),
        ("inspect MODELS/pixels --data digits --steps 0", "elit inspect: steps must be at least 1, got 0"),
        ("inspect MODELS/pixels --data digits --vae nothing", "elit inspect: vae='nothing': no such folder"),
        ("inspect MODELS/pixels --data digits --out MODELS/pixels/config.json", "elit inspect: cannot write out="),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(models, tmp_path, capsys, line, message):
    assert main(line.replace("MODELS", str(models)).split()) == 2
    out, err = capsys.readouterr()
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert out == ""
    assert not list(tmp_path.iterdir())
