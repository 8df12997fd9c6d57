"""Settings as plain values: in a picture, and back."""

import json
import subprocess
import sys

import pytest

import elit
from elit.sampling.settings import SampleRecord, SampleSettings

SETTINGS = SampleSettings(labels=("3", "7"), budget="4@0-0.5,16@0.5-1", guidance="ccfg", scale=2, steps=8, seed=5)


def test_a_record_is_text_and_back():
    record = SampleRecord(model="fashion", weights="ab", settings=SETTINGS, row=2, made_with={"torch": "2"})
    assert record.to_text().isascii()
    assert SampleRecord.from_text(record.to_text(), "x") == record


def test_arguments_are_those_of_sample():
    arguments = SETTINGS.arguments()
    assert arguments["guidance"] == elit.CCFG(2, 1)
    assert arguments["budget"] == "4@0-0.5,16@0.5-1"
    assert SampleSettings().arguments()["budget"] is None
    assert SampleSettings(budget="8").arguments()["budget"] == 8
    assert SampleSettings(step_budgets=("8", "0.5")).arguments()["step_budgets"] == [8, 0.5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": "8"}, "x: steps='8' is no valid value"),
        ({"steps": True}, "steps=True"),
        ({"labels": "3"}, "labels='3'"),
        ({"labels": [3]}, r"labels=\[3\]"),
        ({"guidance": "best"}, "guidance='best'"),
        ({"guidance_interval": [0]}, r"guidance_interval=\[0\]"),
        ({"scale": None}, "scale=None"),
        ({"out": "/etc/passwd"}, "x: unknown setting 'out'"),
    ],
)
def test_values_from_elsewhere_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        SampleSettings.from_values(change, "x")


@pytest.mark.parametrize(
    "text", ["", "no", "[]", "{}", '{"settings": {}}', '{"settings": {}, "model": 1, "weights": "a"}', "[" * 9999]
)
def test_a_damaged_record_is_one_line(text):
    with pytest.raises(ValueError, match="x: what it says of its settings is damaged"):
        SampleRecord.from_text(text, "x")
    content = json.loads(SampleRecord(model="a", weights="b", settings=SETTINGS).to_text())
    with pytest.raises(ValueError, match="damaged"):
        SampleRecord.from_text(json.dumps(content | {"row": -1}), "x")


@pytest.mark.slow
def test_settings_need_no_torch():
    code = "import sys, elit.sampling.settings; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


SAMPLINGS = [
    elit.Sampling(),
    elit.Sampling(steps=8, budget=8, guidance=elit.CFG(2.0, interval=(0.2, 0.7)), seed=3, dtype="bfloat16"),
    elit.Sampling(budget=0.5, guidance=elit.AG(1.5, 0.25), solver="heun"),
    elit.Sampling(budget="50%@0-0.5,100%@0.5-1", guidance=elit.CCFG(3, 1), shift=2.0, cache=0.1),
    elit.Sampling(steps=2, budget=(8, None)),
    elit.Sampling(sample_budgets=(8, 0.5)),
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_sampling_is_json_and_back(sampling):
    assert elit.Sampling.from_dict(json.loads(json.dumps(sampling.to_dict()))) == sampling


@pytest.mark.parametrize(
    ("values", "sampling"),
    [
        ({"budget": "full", "guidance": "none", "scale": 1.5, "labels": ["3"]}, elit.Sampling()),
        ({"budget": "8", "step_budgets": [], "sample_budgets": []}, elit.Sampling(budget=8)),
        ({"detector": "x", "budget": "all", "guidance": "cfg", "scale": 2.0, "guidance_low": 0.1, "guidance_high": 0.5},
         elit.Sampling(guidance=elit.CFG(2.0, interval=(0.1, 0.5)))),
        ({"detector": "x", "budget": "0.5@0-0.5,1@0.5-1"}, elit.Sampling(budget="50%@0-0.5,100%@0.5-1")),
        ({"detector": "x", "steps": 3, "budget": "8×1, 16×2"}, elit.Sampling(steps=3, budget=(8, 16, 16))),
        ({"batch": 2, "steps": 3, "budget": 4, "kind": "ccfg", "weak": 2},
         elit.Sampling(steps=3, budget=4, guidance=elit.CCFG(1.5, 2))),
        ({"budget": [8, 16], "guidance": {"kind": "ag", "scale": 2.0, "budget": 4, "interval": [0, 1]}, "steps": 2},
         elit.Sampling(steps=2, budget=(8, 16), guidance=elit.AG(2.0, 4))),
    ],
)  # fmt: skip
def test_what_earlier_versions_wrote_is_read(values, sampling):
    assert elit.Sampling.from_dict(values) == sampling


def test_sampling_in_one_line():
    assert [sampling.describe() for sampling in SAMPLINGS] == [
        "40 steps",
        "8 steps, budget 8, cfg 2 for t = 0.2 to 0.7",
        "40 steps, budget 50%, ag 1.5 at budget 25%, heun",
        "40 steps, budget 50%@0-0.5,100%@0.5-1, ccfg 3 at budget 1, shift 2, cache 0.1",
        "2 steps, budget 8×1, full×1",
        "40 steps",
    ]
