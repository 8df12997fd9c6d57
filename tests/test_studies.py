"""Each study from end to end in a few steps, their rule and document, and tuned schedules against all there are."""

import importlib
import itertools
import json
import math
import random
import runpy
import statistics
import sys
from pathlib import Path

import pytest
import torch
from conftest import conditions, inputs, opened

from elit.budgets import schedule_budgets
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


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
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


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_result_in_the_repository_is_whole(script):
    from verdicts import overall, verdict

    number = script.stem[len("claim")]
    result = json.loads((ROOT / "studies" / "results" / f"claim{number}.json").read_text(encoding="utf-8"))
    check(result, script)
    assert len(result["seeds"]) >= 3
    for part in result["parts"]:
        assert part["verdict"] == verdict(part["advantages"])
        assert part["mean"] == pytest.approx(statistics.mean(part["advantages"]), rel=1e-4, abs=1e-6)
    assert result["verdict"] == overall([part["verdict"] for part in result["parts"]])
    costs = [arm["training_tflops"] for arm in result["arms"].values()]
    if number != "1":  # which asks what more computation gives
        assert max(costs) / min(costs) < 1.032  # a batch is whole images, of 32


def check(result, script):
    assert set(result) == FIELDS
    assert result["claim"] == int(script.stem[len("claim")])
    assert result["command"].startswith(f"python studies/{script.name} --seeds ")
    assert set(result["versions"]) == {"elit", "torch", "python"}
    for row in result["rows"]:
        assert len(row["values"]) == len(result["seeds"])
        assert row["mean"] == pytest.approx(statistics.mean(row["values"]), rel=1e-4, abs=1e-6)
        assert all(math.isfinite(value) for value in row["values"])


def test_random_drop_drops_nothing_at_full_budget_and_something_below():
    from claim2_tail_drop import RandomDropDiT

    plain = opened("elit-dit")
    random = RandomDropDiT.from_config(plain.config)
    random.load_state_dict(plain.state_dict())
    torch.testing.assert_close(random(*inputs(random)), plain(*inputs(plain)))
    assert not torch.equal(random(*inputs(random), 8), plain(*inputs(plain), 8))


def test_padding_is_seen_by_the_network_and_by_nobody_else():
    from claim1_padding import PaddedDiT

    model = PaddedDiT(sample_size=8, in_channels=1, patch_size=2, hidden_size=24, depth=1, num_heads=2, num_classes=10)
    seen = []
    model.patch_embed.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    x = torch.randn(3, 1, 8, 8)
    assert model(x, torch.rand(3), torch.arange(3)).shape == x.shape
    assert seen[0].shape == (3, 64, 4)
    assert (seen[0].abs().sum(-1) > 0).sum() == 3 * 16


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


@pytest.mark.parametrize("seed", range(10))
def test_the_search_is_as_good_as_trying_all_monotone_schedules(seed):
    from tune_schedule import best_schedule

    draw = random.Random(seed)
    parts, budgets = draw.randint(1, 5), draw.randint(2, 5)
    costs = sorted(draw.sample(range(1, 30), budgets))
    lost = [[draw.random() for _ in costs] for _ in range(parts)]
    most = draw.uniform(costs[0], costs[-1]) * parts
    every = {
        chosen: sum(lost[i][k] for i, k in enumerate(chosen))
        for chosen in itertools.product(range(budgets), repeat=parts)
        if list(chosen) in (sorted(chosen), sorted(chosen, reverse=True)) and sum(costs[k] for k in chosen) <= most
    }
    assert every[tuple(best_schedule(lost, costs, most))] == pytest.approx(min(every.values()))


def test_a_schedule_reads_back_as_what_it_was():
    from tune_schedule import schedule_text

    assert schedule_text([4, 4, 4, 4]) == "4"
    assert schedule_text([1, 1, 8, 16]) == "1@0-0.5,8@0.5-0.75,16@0.75-1"
    parts = [1, 2, 2, 5, 5, 5, 9, 16]
    times = [i / 16 for i in range(16)]
    assert schedule_budgets(schedule_text(parts), times, range(1, 17)) == [kept for kept in parts for _ in range(2)]


def test_a_network_is_tuned_by_its_own_loss():
    from tune_schedule import tune_schedule

    model = opened("elit-dit")
    x, y = torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(0)), conditions(model, 6)
    found = tune_schedule(model, x, y, mean_share=0.5, bins=2, draws=1)
    assert schedule_budgets(found.schedule, [0.0, 0.5], model.budgets) == list(found.budgets)
    assert (len(found.budgets), found.share <= 0.5, found.constant, len(found.table)) == (2, True, 8, 2 * 16)
    for kind, share, says in (("dit", 0.5, "no latent interface"), ("elit-dit", 0.01, "the least is 0.0625")):
        with pytest.raises(ValueError, match=says):
            tune_schedule(opened(kind), x, y, mean_share=share)
