"""Every backbone's quickstart with a few steps of training, and what repeats."""

import html
import json
import re
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from conftest import links_of
from PIL import Image

from elit.cli.main import main
from elit.cli.quickstart import PRODUCTS, RECIPES, Args, run
from elit.evaluate.detectors import train_digit_classifier

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _a_classifier_of_one_epoch(monkeypatch):
    """Quickstarts train one each; here nobody looks at what it says."""
    monkeypatch.setattr("elit.cli.quickstart.train_digit_classifier", partial(train_digit_classifier, epochs=1))


@pytest.mark.parametrize("backbone", [name for name in RECIPES if name != "dit"])
def test_every_backbone_goes_all_the_way(backbone, tmp_path, monkeypatch):
    """A few steps of training: what comes out is no digit yet, but every file is there and every advice works."""
    monkeypatch.setitem(RECIPES, backbone, replace(RECIPES[backbone], samples=10))
    monkeypatch.setattr("elit.cli.quickstart.SAMPLING_STEPS", 2)
    monkeypatch.chdir(tmp_path)
    result = run(Args(out=Path("run"), backbone=backbone, steps=3))
    clips = backbone == "video"
    written = {path.name for path in Path("run").iterdir()}
    assert written == set(PRODUCTS) - {"samples"} - (set() if clips else {"samples.gif"})
    assert json.loads(Path("run/results.json").read_text()) == result
    assert result["backbone"] == backbone
    assert [row["tokens_per_group"] for row in result["rows"][::2]] == list(RECIPES[backbone].budgets)
    assert all(("steady" in row) == clips for row in result["rows"])
    page = Path("run/report.html").read_text()
    assert [link.split(";")[0] for link in links_of(page)].count("data:image/gif") == clips
    if clips:
        with Image.open("run/samples.gif") as animation:
            assert animation.n_frames == 4
    code = html.unescape(re.search(r"<pre><code>(.*?)</code>", page, flags=re.DOTALL)[1])
    sampling, training, clothes = code.splitlines()
    assert main(shlex.split(sampling)[1:]) == 0
    assert Path("clips.gif" if clips else "digits.png").is_file()
    assert main([*shlex.split(training)[1:], "--steps", "1"]) == 0
    if backbone == "uvit":  # the same line in all reports
        assert main([*shlex.split(clothes)[1:], "--steps", "1"]) == 0
        assert Path("clothes.png").is_file()


def test_the_same_seed_gives_the_same_numbers_and_only_a_quickstart_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "dit", replace(RECIPES["dit"], samples=10))
    monkeypatch.setattr("elit.cli.quickstart.SAMPLING_STEPS", 2)
    for drawing in ("write_pictures", "write_report"):
        monkeypatch.setattr(f"elit.cli.quickstart.{drawing}", lambda *_: None)

    def numbers(seed, **settings):
        result = run(Args(out=tmp_path / "run", steps=3, seed=seed, **settings))
        return [{k: v for k, v in row.items() if k != "ms_per_image"} for row in result["rows"]]

    first = numbers(0)
    with pytest.raises(ValueError, match="it exists; give another name, or --overwrite to replace it"):
        numbers(0)
    assert numbers(0, overwrite=True) == first
    assert numbers(1, overwrite=True) != first
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds 'notes\.txt', which this command has not written"):
        numbers(0, overwrite=True)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
