"""Every backbone's quickstart with a few steps of training, and what repeats."""

import json
from functools import partial
from pathlib import Path

import pytest
from conftest import links_of

from elit.cli.main import main
from elit.cli.quickstart import NETWORKS, PRODUCTS, Args, run
from elit.data.builtin import digits, moving_digits
from elit.data.images import ImageSet
from elit.evaluate.detectors import train_digit_classifier

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("empty_folder")]


def few(data: ImageSet) -> ImageSet:
    return ImageSet(data.images[:400], data.labels[:400], data.classes, data.captions)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Few samples and digits to score, and a classifier of one epoch: here nobody looks at what it says."""
    changes = {"train_digit_classifier": partial(train_digit_classifier, epochs=1), "SAMPLES": 8, "SAMPLING_STEPS": 1}
    changes |= {"digits": lambda: few(digits()), "moving_digits": lambda: few(moving_digits(clips_per_digit=1))}
    for name, value in changes.items():
        monkeypatch.setattr(f"elit.cli.quickstart.{name}", value)


@pytest.mark.parametrize("backbone", [name for name in NETWORKS if name != "dit"])
def test_every_backbone_goes_all_the_way(backbone):
    """A few steps of training: what comes out is no digit yet, but every file is there, and model and settings work."""
    result = run(Args(out=Path("run"), backbone=backbone, steps=3))
    assert {path.name for path in Path("run").iterdir()} == set(PRODUCTS) - {"samples", "samples.gif"}
    assert json.loads(Path("run/results.json").read_text()) == result
    budgets = {"hdit": [16, 8, 4], "video": [12, 6, 3, 2, 1]}.get(backbone, [16, 8, 4, 2, 1])
    assert [row["tokens_per_group"] for row in result["rows"][::2]] == budgets
    assert all(("steady" in row) == (backbone == "video") for row in result["rows"])
    assert len(links_of(Path("run/report.html").read_text())) == 3
    prompts = ["--prompts", "a handwritten three"] if backbone == "mmdit" else ["--count", "1"]
    guidance = ["--guidance", "ccfg", "--guidance-budget", str(budgets[-1])]
    assert main(["sample", "run/model", *prompts, "--steps", "1", "--budget", "50%", *guidance]) == 0
    assert main(["train", "--config", "run/config.yaml", "--steps", "1", "--out", "longer"]) == 0


def test_the_same_seed_gives_the_same_numbers(monkeypatch):
    for name in ("draw", "write_page"):
        monkeypatch.setattr(f"elit.cli.quickstart.{name}", lambda *_: None)

    def numbers(seed):
        result = run(Args(out=Path("run"), steps=2, seed=seed, overwrite=True))
        return [{k: v for k, v in row.items() if k != "ms_per_image"} for row in result["rows"]]

    first = numbers(0)
    assert numbers(0) == first
    assert numbers(1) != first
