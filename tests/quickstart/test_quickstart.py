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
    """A folder in which `elit quickstart` has run, with a quarter of the samples, and half of the steps that draw them;
    200 of its 700 steps of training are enough."""
    folder = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("elit.cli.quickstart.train_digit_classifier", digit_classifiers)
        patch.setattr("elit.cli.quickstart.SAMPLES", 50)
        patch.setattr("elit.cli.quickstart.SAMPLING_STEPS", 8)
        patch.chdir(folder)
        assert main(["quickstart", "--steps", "200"]) == 0
    return folder


def test_results_files_and_a_report_that_needs_no_other(workplace):
    rows = json.loads((workplace / "runs/quickstart/results.json").read_text())["rows"]
    accuracies = {(row["tokens_per_group"], row["guidance"]): row["accuracy"] for row in rows}
    assert len(accuracies) == 10
    assert accuracies[16, "none"] >= 0.80
    assert accuracies[16, "ccfg"] >= 0.97
    for guidance in ("none", "ccfg"):
        costs = [row["gflops_per_image"] for row in rows if row["guidance"] == guidance]
        assert costs == sorted(set(costs), reverse=True)
    keys = ["budget", "tokens_per_group", "guidance", "gflops_per_image", "ms_per_image", "fd", "accuracy"]
    assert all(list(row) == keys for row in rows)

    out = workplace / "runs/quickstart"
    assert {path.name for path in out.iterdir()} == set(PRODUCTS) - {"samples", "samples.gif"}
    for name in ("samples.png", "compute_quality.png", "read_attention.png"):
        assert min(Image.open(out / name).size) > 300
    links = links_of((out / "report.html").read_text())
    assert [link.split(",")[0] for link in links] == ["data:image/png;base64"] * 3


def test_the_readmes_commands_run_as_written(workplace, monkeypatch):
    """The `elit` lines of the README's shell blocks, but for the quickstart itself, which has run."""
    monkeypatch.chdir(workplace)
    measured, less_time = elit.cli.sample.measured, {"seconds": 0, "batch_sizes": (1, 2)}  # half a minute of a user's
    monkeypatch.setattr(elit.cli.sample, "measured", lambda *a, **o: measured(*a, **o | less_time))
    monkeypatch.setattr("elit.planner.profile.MIN_ROUNDS", 1)
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("elit ")]
    assert {words[0] for words in commands} >= {"train", "sample", "evaluate", "sweep", "flops"}
    less = {"evaluate": ["--count", "66"], "sweep": ["--count", "32", "--steps", "1", "2"]}
    for words in commands:
        less["train"] = ["--steps", "9" if "--resume" in words else "6"]
        steps = ["--steps", "8"] if words[0] == "sample" and "--target-ms" not in words else []
        if words[0] != "quickstart":
            assert main([*words, *less.get(words[0], steps)]) == 0, words


def test_the_readmes_python_runs_as_written(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    names: dict = {}
    for block in blocks:
        exec(block, names)
