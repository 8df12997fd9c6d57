"""Settings as plain values: in a picture, in tables, and back."""

import json

import pytest

import elit
from elit.sampling.pictures import PictureRecord, Subject

SAMPLING = elit.Sampling(budget="4@0-0.5,16@0.5-1", guidance=elit.CCFG(2.0, 1), steps=8, seed=5, dtype="float32")
ABOUT = {"model": "fashion", "weights": "ab", "row": 2, "made_with": {"torch": "2"}}
RECORD = PictureRecord(sampling=SAMPLING, subject=Subject(labels=("3", "7")), **ABOUT)
OLD = (
    '{"model":"fashion","weights":"ab","settings":{"labels":["3","7"],"prompts":[],"text_encoder":null,"count":null,'
    '"budget":"4@0-0.5,16@0.5-1","step_budgets":[],"sample_budgets":[],"guidance":"ccfg","scale":2.0,'
    '"guidance_budget":"1","guidance_interval":[0.0,1.0],"steps":8,"solver":"euler","shift":1.0,"cache":0.0,"seed":5,'
    '"batch_size":64,"dtype":"float32"},"row":2,"made_with":{"torch":"2"}}'
)
"""The record of 0.1.0."""


def test_a_record_is_text_and_back_and_that_of_an_earlier_version_is_read():
    assert RECORD.to_text().isascii()
    assert PictureRecord.from_text(RECORD.to_text()) == RECORD == PictureRecord.from_text(OLD)
    assert json.loads(RECORD.to_text()) == json.loads(OLD)  # which earlier versions read


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": "8"}, "steps must be of type int, got '8'"),
        ({"labels": "3"}, "labels must be texts, got '3'"),
        ({"guidance": "best"}, "guidance"),
        ({"guidance_interval": [0]}, "guidance_interval must be two numbers"),
        ({"scale": "2"}, "scale must be of type float"),
        ({"count": 0}, "count must be at least 1"),
        ({"out": "/etc/passwd"}, "settings must be known, got .'out'"),
    ],
)
def test_values_from_elsewhere_are_checked(change, message):
    content = json.loads(OLD)
    with pytest.raises(ValueError, match=message):
        PictureRecord.from_text(json.dumps(content | {"settings": content["settings"] | change}))


@pytest.mark.parametrize(
    "text", ["", "no", "[]", "{}", '{"settings": {}}', '{"settings": {}, "model": 1, "weights": "a"}', "[" * 9999]
)
def test_a_damaged_record_is_one_line(text):
    with pytest.raises(ValueError, match="the settings in it are damaged") as error:
        PictureRecord.from_text(text)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="damaged"):
        PictureRecord.from_text(json.dumps(json.loads(OLD) | {"row": -1}))


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
