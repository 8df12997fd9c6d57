"""The benchmarks run and print what they promise."""

import json
import math
from importlib import import_module
from pathlib import Path

import pytest
import serving
import torch
from conftest import inputs, opened
from service import row, saved_model
from simulator import bursty_rates, simulate

from elit.planner.cost import Costs
from elit.serve.loadtest import Outcome, arrivals, summarize
from elit.serve.policy import PolicySettings
from elit.serve.settings import ServiceSettings

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("digit_classifiers")]

COSTS = Costs(call=2.0, core=0.5, around=6.0, linear=0.5, image=3.0)
RUNGS = ServiceSettings(model="digits", steps=8, least_steps=8).ladder(range(1, 17))


def quick(part: str, folder: Path, *line: str) -> dict:
    out = folder / f"{part}.json"
    assert import_module("run").main([part, "--quick", "--out", str(out), *line]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["command"].startswith(f"python benchmarks/run.py {part} --quick")
    assert set(result) == {"command", "versions", "hardware", "settings", "seconds", "summary", "rows"}
    values = [value for each in result["rows"] for value in each.values() if isinstance(value, float)]
    assert all(map(math.isfinite, values))
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


def test_elastic_meets_more_deadlines_than_full_and_gives_more_than_the_floor():
    slots = COSTS.efficient_batch(RUNGS[0], 8)
    trace = arrivals(bursty_rates(60, 1.6 * COSTS.rate(RUNGS[-1], slots), seed=3), seed=3)

    def run(ladder, **options):
        outcomes = simulate(trace, ladder, COSTS, PolicySettings(slots=slots), deadline_ms=2000, **options)
        assert len(outcomes) == len(trace)
        return summarize(outcomes)

    elastic, full, low = run(RUNGS), run(RUNGS[-1:], patient=True), run(RUNGS[:1])
    assert 5 * elastic["violations"] < full["violations"]
    assert elastic["violations"] < run(RUNGS[-1:])["violations"]
    assert elastic["mean_budget"] > 2 * low["mean_budget"]
    assert elastic["late"] == 0
    eight = run(RUNGS, replicas=8)  # they share the load
    assert eight["violations"] < elastic["violations"]
    assert eight["mean_budget"] > elastic["mean_budget"]


def test_the_benchmark_measures_all_systems_and_says_quality_over_time(tmp_path, capsys):
    table, out = tmp_path / "sweep.jsonl", tmp_path / "out.json"
    settings = [("all", 2, 6.0), ("all", 6, 4.0), ("2", 2, 9.0), ("2", 6, 8.0), ("1", 6, 20.0)]
    table.write_text("\n".join(json.dumps(row(*each)) for each in settings))
    line = f"--model {saved_model(tmp_path / 'digits')} --steps 4 --seconds 1 --sweep {table} --out {out}"
    assert serving.main(f"{line} --systems elastic shedding --threads 1 --patience 4".split()) == 0
    assert "fd of what was served, measured, in 10 even pieces of the trace" in capsys.readouterr().out
    runs = {(each["run"], each["system"]): each["mean_quality"] for each in json.loads(out.read_text())["rows"]}
    assert {system for run, system in runs if run == "measured"} == {"elastic", "shedding"}
    assert runs["simulated", "full"] == pytest.approx(4 + 2 * math.log(6 / 4) / math.log(3))
    assert runs["simulated", "low"] == 20
    quality = serving.quality_of(table, (1, 2, 3, 4))[1]
    three = Outcome(arrival=0, deadline=1, finish=1, budget=3, steps=6)
    assert quality(three) == pytest.approx(8 - 4 * math.log(3 / 2) / math.log(2))
    assert (tmp_path / "out-measured.png").is_file()
