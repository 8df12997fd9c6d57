"""The benchmarks run and print what they promise."""

import json
import math
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import inputs, opened

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("digit_classifiers")]

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def quick(part: str, folder: Path, *line: str) -> dict:
    out = folder / f"{part}.json"
    assert import_module("run").main([part, "--quick", "--out", str(out), *line]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["command"].startswith(f"python benchmarks/run.py {part} --quick")
    assert set(result) == {"command", "versions", "hardware", "settings", "seconds", "summary", "rows"}
    for row in result["rows"]:
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float)), row
    return result


@pytest.mark.parametrize("part", ["forward", "training"])
def test_time_against_flops(part, tmp_path, capsys):
    rows = quick(part, tmp_path)["rows"]
    assert [row["budget"] for row in rows] == [None, 4, 1]
    assert rows[1]["time_over_flops"] == pytest.approx(1)
    assert rows[2]["gflops"] < rows[1]["gflops"]
    assert part == "forward" or 0 < rows[2]["peak_mib"] < rows[1]["peak_mib"]
    assert "worst time/FLOPs" in capsys.readouterr().out


def test_guidance_and_the_naive_and_the_mixed_batch(tmp_path, capsys):
    rows = {row["guidance"]: row for row in quick("guidance", tmp_path)["rows"]}
    assert rows["none"]["saved_closed_form"] == pytest.approx(0.5)
    assert 0 < rows["ccfg"]["saved_closed_form"] < 0.5
    assert rows["cfg"]["saved"] == 0
    result = quick("naive", tmp_path)
    assert all(0 < row["mib"] < row["naive_mib"] for row in result["rows"])  # counted, not timed
    assert result["summary"]["difference"] <= 1e-5
    assert result["summary"]["memory"] < result["summary"]["memory_at_most"] < 1
    (row,) = quick("mixed", tmp_path, "--batch-size", "4")["rows"]
    assert set(row["budgets"]) <= {1, 2, 3, 4}
    assert row["closed_form"] > 1
    assert row["difference"] <= 1e-4
    said = capsys.readouterr().out
    assert all(each in said for each in ("of CFG's wall-clock", "the naive throughput", "padding to the largest"))


def test_naive_is_the_same_network():
    naive = import_module("naive")
    model = opened("elit-dit")
    masked = naive.NaiveDiT(model)
    theirs = dict(masked.named_parameters())
    x, t, y = inputs(model, 2, (16, 24))
    for budget in model.budgets:
        v, expected = masked(x, t, y, budget), model(x, t, y, budget)
        torch.testing.assert_close(v, expected, rtol=1e-5, atol=1e-5)
        model.zero_grad()
        masked.zero_grad()
        v.square().mean().backward()
        expected.square().mean().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(theirs[name].grad, parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_the_gpu_script_rehearses_on_a_cpu(capsys):
    gpu = import_module("gpu")
    assert gpu.main(["--device", "cpu", "--quick", "--one", "forward"]) == 0
    plain, full, least = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert full["time"] == full["FLOPs"] == 1 > least["FLOPs"]
    assert plain["budget"] is None
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["nothing"])
