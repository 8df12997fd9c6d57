"""The quickstart in full, once, and every backbone's with a few steps of training."""

import json
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
from conftest import links_of
from PIL import Image

import elit.cli.sample
from elit.cli.main import main
from elit.cli.quickstart import PRODUCTS, Args, run
from elit.data.builtin import digits, moving_digits
from elit.data.images import ImageSet
from elit.evaluate.detectors import train_digit_classifier

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("empty_folder")]

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, digit_classifiers):
    """A folder in which `elit quickstart` has run, with three budgets, a quarter of the samples, and half of the steps
    that draw them; 200 of its 700 steps of training are enough."""
    less = {"SAMPLES": 50, "SAMPLING_STEPS": 8, "SHARES": ("100%", "25%", "6.25%")}
    folder = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (less | {"train_digit_classifier": digit_classifiers}).items():
            patch.setattr(f"elit.cli.quickstart.{name}", value)
        patch.chdir(folder)
        assert main(["quickstart", "--steps", "200"]) == 0
    return folder


def test_results_files_and_a_report_that_needs_no_other(workplace):
    out = workplace / "runs/quickstart"
    rows = json.loads((out / "results.json").read_text())["rows"]
    accuracies = {(row["tokens_per_group"], row["guidance"]): row["accuracy"] for row in rows}
    assert len(accuracies) == 6
    assert accuracies[16, "none"] >= 0.80
    assert accuracies[16, "ccfg"] >= 0.97
    for guidance in ("none", "ccfg"):
        costs = [row["gflops_per_image"] for row in rows if row["guidance"] == guidance]
        assert costs == sorted(set(costs), reverse=True)
    keys = ["budget", "tokens_per_group", "guidance", "gflops_per_image", "ms_per_image", "fd", "accuracy"]
    assert all(list(row) == keys for row in rows)
    assert {path.name for path in out.iterdir()} == set(PRODUCTS) - {"samples", "samples.gif"}
    for name in ("samples.png", "compute_quality.png", "read_attention.png"):
        assert min(Image.open(out / name).size) > 300
    links = links_of((out / "report.html").read_text())
    assert [link.split(",")[0] for link in links] == ["data:image/png;base64"] * 3


def test_the_readmes_commands_run_as_written(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    measured, less_time = elit.cli.sample.measured, {"seconds": 0, "batch_sizes": (1, 2)}  # half a minute of a user's
    monkeypatch.setattr(elit.cli.sample, "measured", lambda *a, **o: measured(*a, **o | less_time))
    monkeypatch.setattr("elit.planner.profile.MIN_ROUNDS", 1)
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("elit ")]
    assert {words[0] for words in commands} >= {"train", "sample", "evaluate", "sweep", "flops"}
    less = {"evaluate": "--count 8 --steps 2", "sweep": "--count 8 --chunk 8 --steps 1 2", "sample": "--steps 2"}
    for words in commands:
        options = "--steps 4" if "--resume" in words else "--steps 2" if words[0] == "train" else less.get(words[0], "")
        if words[0] != "quickstart":
            assert main([*words, *("" if "--target-ms" in words else options).split()]) == 0, words


def test_the_readmes_python_runs_as_written(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    names: dict = {}
    for block in blocks:
        exec(block, names)


def few(data: ImageSet) -> ImageSet:
    return ImageSet(data.images[:400], data.labels[:400], data.classes, data.captions)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    changes = {"train_digit_classifier": partial(train_digit_classifier, epochs=1), "SAMPLES": 8, "SAMPLING_STEPS": 1}
    changes |= {"digits": lambda: few(digits()), "moving_digits": lambda: few(moving_digits(clips_per_digit=1))}
    for name, value in changes.items():
        monkeypatch.setattr(f"elit.cli.quickstart.{name}", value)


@pytest.mark.parametrize("backbone", ["mmdit", "video"])
def test_a_backbone_goes_all_the_way(backbone):
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
