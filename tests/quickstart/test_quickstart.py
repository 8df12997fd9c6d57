"""The quickstart in full, once: its results, its files, and the README's commands on what it leaves."""

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import links_of
from PIL import Image

import elit.cli.sample
from elit.cli.main import main
from elit.cli.quickstart import PRODUCTS

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.slow


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
    """The `elit` lines of the README's shell blocks, but for the quickstart itself, which has run; with less to do."""
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
