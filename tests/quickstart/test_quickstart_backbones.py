"""Every backbone's quickstart with a few steps of training, and what repeats."""

import json
from functools import partial
from pathlib import Path

import pytest
from conftest import links_of

from elit.cli.main import main
from elit.cli.quickstart import NETWORKS, PRODUCTS, Args, run
from elit.evaluate.detectors import train_digit_classifier

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("empty_folder")]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Few samples, and a classifier of one epoch: here nobody looks at what it says."""
    monkeypatch.setattr("elit.cli.quickstart.train_digit_classifier", partial(train_digit_classifier, epochs=1))
    monkeypatch.setattr("elit.cli.quickstart.SAMPLES", 10)
    monkeypatch.setattr("elit.cli.quickstart.SAMPLING_STEPS", 2)


@pytest.mark.parametrize("backbone", [name for name in NETWORKS if name != "dit"])
def test_every_backbone_goes_all_the_way(backbone):
    """A few steps of training: what comes out is no digit yet, but every file is there, and model and settings work."""
    result, clips = run(Args(out=Path("run"), backbone=backbone, steps=3)), backbone == "video"
    written = {path.name for path in Path("run").iterdir()}
    assert written == set(PRODUCTS) - {"samples", "samples.gif"}
    assert json.loads(Path("run/results.json").read_text()) == result
    budgets = {"hdit": [16, 8, 4], "video": [12, 6, 3, 2, 1]}.get(backbone, [16, 8, 4, 2, 1])
    assert [row["tokens_per_group"] for row in result["rows"][::2]] == budgets
    assert all(("steady" in row) == clips for row in result["rows"])
    page = Path("run/report.html").read_text()
    assert len(links_of(page)) == 3
    prompts = ["--prompts", "a handwritten three"] if backbone == "mmdit" else []
    guidance = ["--guidance", "ccfg", "--guidance-budget", str(budgets[-1])]
    assert main(["sample", "run/model", *prompts, "--steps", "1", "--budget", "50%", *guidance]) == 0
    assert main(["train", "--config", "run/config.yaml", "--steps", "1", "--out", "longer"]) == 0


def test_the_same_seed_gives_the_same_numbers(monkeypatch):
    monkeypatch.setattr("elit.cli.quickstart.draw", lambda *_: None)
    monkeypatch.setattr("elit.cli.quickstart.write_page", lambda *_: None)

    def numbers(seed):
        result = run(Args(out=Path("run"), steps=3, seed=seed, overwrite=True))
        return [{k: v for k, v in row.items() if k != "ms_per_image"} for row in result["rows"]]

    first = numbers(0)
    assert numbers(0) == first
    assert numbers(1) != first
