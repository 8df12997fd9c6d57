"""Sampling with one network: schedules, engines' runs, settings as plain values, pictures as files."""

import json

import numpy as np
import pytest
import torch
from conftest import opened
from PIL import Image

import elit
from elit import AG, CCFG, CFG, Sampling
from elit.sampling.engine import NetworkEngine, conditions_of, take
from elit.sampling.pictures import (
    FORMATS,
    MOVING,
    PictureRecord,
    Subject,
    encode_picture,
    image_grid,
    label_sheet,
    read_text,
    to_uint8,
    write_samples,
)
from elit.sampling.sample import sample

STEPS = 4


@pytest.mark.parametrize("guidance", [None, elit.CFG(2.0), elit.CCFG(2.0, 1), elit.AG(2.0, 2), elit.AG(2.0, 3)])
@pytest.mark.parametrize("kind", ["elit-dit", "elit-uvit", "elit-mmdit", "elit-sit"])
def test_a_budget_a_sample_is_that_sample_alone(kind, guidance):
    model = opened(kind)
    budgets, settings = [16, 4, 4, 1.0, 0.5], {"steps": 2, "guidance": guidance}
    y = model.conditioning.example(5)
    mixed = sample(model, y, sample_budgets=budgets, batch_size=3, **settings)
    for i, budget in enumerate(budgets):
        alone = sample(model, y[i : i + 1], budget=budget, seed=i, **settings)
        torch.testing.assert_close(mixed[i : i + 1], alone, rtol=0, atol=1e-4)
    equal = sample(model, y, sample_budgets=[4] * 5, **settings)
    if guidance is None or guidance.drop_class:  # in autoguidance a batch of one budget shares its head
        assert torch.equal(equal, sample(model, y, budget=4, **settings))


def test_a_schedule_changes_the_budget_on_the_way():
    model = opened("elit-dit")
    seen = []
    read = model.latent_interface.read
    model.latent_interface.read = lambda s, c, windows, budget: seen.append(budget) or read(s, c, windows, budget)
    sample(model, [0], steps=STEPS, budget="50%@0-0.5,100%@0.5-1")
    assert seen == [8, 8, 16, 16]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": [16, 4]}, r"budget must be one budget, got \[16, 4\]"),
        ({"step_budgets": [16, 1, 1]}, "step_budgets must be one a step, got 3 for 2"),
        ({"sample_budgets": [4] * 2, "step_budgets": [4] * 2}, "cannot take step_budgets and sample_budgets at once"),
        ({"sample_budgets": [4, 1], "guidance": elit.AG(2.0, 2)}, "guidance_budget must be at most .* 1 for ag"),
        ({"y": []}, "y must be at least one label"),
        ({"solver": "rk4"}, "solver must be one of euler, heun, got 'rk4'"),
        ({"noise": torch.randn(2, 3, 16, 16)}, r"noise must be of shape .*, got \(2, 3, 16, 16\)"),
        ({"noise": torch.zeros(2, 4, 16, 16), "seed": 3}, "cannot take noise with seed or sample_size"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, .* got 'int8'"),
        ({"cache": 0.1, "solver": "heun"}, "cache=0.1 is not supported for 'heun'"),
        ({"guidance": elit.AG(2.0, 8), "budget": 8}, "guidance_budget must be below the main branch's for ag, got 8"),
        ({"guidance": elit.CFG(2.0, interval=(0.1, 0.2))}, "guidance interval must be around the t of a step"),
    ],
)
def test_bad_settings_are_named_in_one_line(settings, message):
    settings = {"y": [0, 1], "steps": 2} | settings
    with pytest.raises(ValueError, match=message) as error:
        sample(opened("elit-dit"), **settings)
    assert "\n" not in str(error.value)


def test_generators_as_seeds():
    model, seeded = opened("elit-dit"), lambda seed: torch.Generator().manual_seed(seed)
    plain = sample(model, [1, 2], steps=1, seed=[3, 9])
    assert torch.equal(sample(model, [1, 2], steps=1, seed=[seeded(3), seeded(9)]), plain)
    source = seeded(3)
    both = sample(model, [1, 2], steps=1, seed=source)
    torch.testing.assert_close(both[0], plain[0], rtol=0, atol=1e-5)
    assert not torch.equal(sample(model, [1], steps=1, seed=source), plain[:1])  # it goes on


SETTINGS = [
    Sampling(steps=3, budget=4),
    Sampling(steps=3, budget=8, guidance=CFG(2.0)),
    Sampling(steps=4, budget="25%@0-0.5,100%@0.5-1", guidance=CCFG(2.0, 1), solver="heun"),
    Sampling(steps=2, guidance=AG(2.0, 2), shift=2.0),
    Sampling(steps=6, cache=100.0),
    Sampling(steps=2, budget=8, dtype="bfloat16"),
]


def finished(engine, model):
    runs = [engine.begin([str(i % 5)], [i], sampling) for i, sampling in enumerate(SETTINGS)]
    while going := [run for run in runs if not run.done]:
        engine.step(going)
    return [(run, sample(model, [i % 5], SETTINGS[i], seed=i)) for i, run in enumerate(runs)]


@pytest.mark.parametrize("exact", [True, False])
def test_runs_together_are_those_alone(exact):
    model = opened("elit-dit")
    for run, alone in finished(NetworkEngine(model, exact=exact), model):
        assert (run.steps_done, run.done) == (run.total, True)
        torch.testing.assert_close(run.x, alone, rtol=0, atol=0 if exact else 1e-4)


def test_a_run_shows_its_state_and_can_be_closed():
    model = opened("elit-dit", in_channels=3)
    engine = NetworkEngine(model)
    states = []
    expected = sample(model, [1], steps=3, on_step=lambda step, t, x: states.append((step, t, x)))
    run = engine.begin(["1"], [0], Sampling(steps=3))
    for step, t, x in states:
        assert (run.steps_done, run.t) == (step, t)
        assert torch.equal(run.x, x)
        run.step()
    assert torch.equal(run.preview(), run.pictures())
    assert torch.equal(run.pictures(), expected)
    other = engine.begin(["1"], [0], Sampling(steps=3))
    other.step()
    assert not torch.equal(other.preview(), expected)
    other.close()
    assert other.done


def test_an_engine_says_what_it_takes():
    engine = NetworkEngine(opened("elit-dit", in_channels=3))
    assert (engine.size, engine.classes, engine.makes_pictures) == ((16, 16), tuple("01234"), True)
    assert conditions_of(engine, ["3", "1"], []).tolist() == [3, 1]
    assert take(conditions_of(engine, [], []), range(3, 7)).tolist() == [3, 4, 0, 1]
    with pytest.raises(ValueError, match="prompts are not supported for this model"):
        conditions_of(engine, [], ["a seven"])
    with pytest.raises(ValueError, match="labels must be a class, 0 to 4"):
        engine.conditions(["9"])
    full, half = (engine.gflops(Sampling(steps=2, budget=budget)) for budget in (None, 8))
    assert half < full < engine.gflops(Sampling(steps=2, guidance=CFG(2.0)))
    assert engine.begin(["1"], [0], Sampling(), size=(24, 16)).x.shape == (1, 3, 16, 24)


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


FRAMES = [Image.new("RGB", (8, 6), (60 * i, 0, 99)) for i in range(3)]


@pytest.mark.parametrize(("suffix", "count"), [*((suffix, 1) for suffix in FORMATS), *((each, 3) for each in MOVING)])
def test_every_format_keeps_frames_and_text(suffix, count, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(encode_picture(FRAMES[:count], suffix, '{"seed": 3}'))
    assert read_text(path) == '{"seed": 3}'
    with Image.open(path) as image:
        assert (image.format, image.size, getattr(image, "n_frames", 1)) == (FORMATS[suffix], (8, 6), count)
    path.write_bytes(encode_picture(FRAMES[:count], suffix))
    assert read_text(path) is None


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"hello")
    for name, message in (("a.png", "not a picture"), ("b.png", "no such file")):
        with pytest.raises(ValueError, match=message):
            read_text(tmp_path / name)
    with pytest.raises(ValueError, match="text: 70000 characters"):
        encode_picture(FRAMES[:1], ".png", "a" * 70000)


def test_pictures():
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]
    grid = image_grid(torch.stack([torch.full((1, 2, 2), v) for v in (-1.0, 1.0, -1.0)]), 2, scale=2, gap=2)
    assert grid.size == (10, 10)
    assert grid.getpixel((0, 0)) == (0, 0, 0)
    assert grid.getpixel((4, 0)) == (255, 255, 255)
    assert grid.getpixel((0, 9)) == (0, 0, 0)
    labelled = np.array(label_sheet(grid, ["a", "bb"], ["c" * 99, "d"]))
    assert np.array_equal(labelled[20:, -10:], np.array(grid))
    assert (labelled[20:, :-10].min((1, 2)) < 128).any()


def test_written_samples(tmp_path):
    samples = torch.rand(3, 1, 8, 8) * 2 - 1
    write_samples(samples, tmp_path / "a" / "grid.png", pictures=True)
    assert Image.open(tmp_path / "a" / "grid.png").size == (2 * 64 + 2, 2 * 64 + 2)
    write_samples(samples, tmp_path / "b", pictures=True)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["000000.png", "000001.png", "000002.png"]
    write_samples(samples, tmp_path / "c.npz", pictures=True)
    array = np.load(tmp_path / "c.npz")["arr_0"]
    assert (array.shape, array.dtype) == ((3, 8, 8, 3), np.uint8)
    latents = torch.randn(2, 16, 4, 4)
    write_samples(latents, tmp_path / "d.npz", pictures=False)
    assert np.array_equal(np.load(tmp_path / "d.npz")["arr_0"], latents.numpy())
    with pytest.raises(ValueError, match="latents, no pictures"):
        write_samples(latents, tmp_path / "e.png", pictures=False)
    with pytest.raises(ValueError, match="must be a folder, or end in one of"):
        write_samples(samples, tmp_path / "f.txt", pictures=True)
    assert not list(tmp_path.rglob(".*"))
