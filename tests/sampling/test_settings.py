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
