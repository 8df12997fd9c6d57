"""Discrete events against closed forms and against a plain replay; arrivals; summaries."""

import json
import math

import pytest
import serving
from service import row, saved_model
from simulator import bursty_rates, simulate

from elit.planner.cost import Costs
from elit.serve.loadtest import Outcome, arrivals, summarize
from elit.serve.policy import PolicySettings
from elit.serve.settings import ServiceSettings

COSTS = Costs(call=2.0, core=0.5, around=6.0, linear=0.5, image=3.0)
RUNGS = ServiceSettings(model="digits", steps=8, least_steps=8).ladder(range(1, 17))


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


@pytest.mark.slow
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
