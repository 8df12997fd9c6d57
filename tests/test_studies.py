"""Each study from end to end in a few steps, their rule and document, and tuned schedules against all there are."""

import importlib
import json
import math
import runpy
import statistics
import sys
from pathlib import Path

import pytest
import torch

from elit.evaluate.detectors import ImageDetector, digit_classifier
from elit.sampling.sample import sample

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "studies").glob("claim*.py"))
FIELDS = {
    *("claim", "command", "notes", "verdict", "seeds", "asked_seeds", "settings", "versions", "hardware", "seconds"),
    *("arms", "parts", "rows"),
}
FOLDERS = ROOT / "benchmarks", ROOT / "studies"
COMMANDS = sorted(path for each in FOLDERS for path in each.rglob("*.py") if "__main__" in path.read_text())


@pytest.fixture(autouse=True)
def studies(monkeypatch):
    """The folder as python sees it that runs a script in it; what a study sets up for itself is undone."""
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_command_says_what_it_does(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.startswith(f"usage: {script.name}")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("networks")


@pytest.mark.parametrize("script", SCRIPTS[::5], ids=lambda path: path.stem)
def test_a_study_runs_and_says_what_made_its_result(script, tmp_path, kept, monkeypatch):
    import scoring

    # One step, and a classifier that knows nothing, show as well as better ones that the parts fit together.
    monkeypatch.setattr(scoring, "detector", lambda: ImageDetector(digit_classifier().eval()))
    monkeypatch.setattr(scoring, "sample", lambda *inputs, **settings: sample(*inputs, **settings | {"steps": 1}))
    # A run counts the FLOPs of every budget, of a network of others by tracing it: here up to 64 times.
    monkeypatch.setattr("elit.training.train.count_flops", lambda network, budget: 1)
    out = tmp_path / "result.json"
    line = ["--seeds", "1", "--steps", "2", "--batch-size", "4", "--samples", "4"]
    importlib.import_module(script.stem).main([*line, "--cache", str(kept), "--out", str(out)])
    result = json.loads(out.read_text(encoding="utf-8"))
    check(result, script)
    assert (result["seeds"], result["verdict"]) == ([0], "undecided")  # one seed decides nothing
    assert result["settings"] == {"steps": 2, "batch_size": 4, "samples": 4}


def check(result, script):
    assert set(result) == FIELDS
    assert result["claim"] == int(script.stem[len("claim")])
    assert result["command"].startswith(f"python studies/{script.name} --seeds ")
    assert set(result["versions"]) == {"elit", "torch", "python"}
    for row in result["rows"]:
        assert len(row["values"]) == len(result["seeds"])
        assert row["mean"] == pytest.approx(statistics.mean(row["values"]), rel=1e-4, abs=1e-6)
        assert all(math.isfinite(value) for value in row["values"])


@pytest.mark.parametrize(
    ("advantages", "expected"),
    [
        *(([1.0, 1.1, 0.9], "holds"), ([-1.0, -1.1, -0.9], "does not hold")),
        # A seed disagrees, the mean is within 2 standard errors, or seeds are too few.
        *((each, "undecided") for each in ([1.0, 1.1, -0.01], [0.01, 0.01, 1.0], [1.0, 1.0])),
    ],
)
def test_the_rule_of_verdicts(advantages, expected):
    from verdicts import overall, verdict

    assert verdict(advantages) == expected
    assert overall(["holds", expected]) == expected  # a claim is as strong as its weakest part


def test_the_document_is_up_to_date(monkeypatch):
    import summary

    monkeypatch.setattr("sys.argv", ["summary.py", "--check"])
    with pytest.raises(SystemExit, match="0"):  # else: run python studies/summary.py
        summary.main()
