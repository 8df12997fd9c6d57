"""The page's engine: the pictures of `elit sample`, their cost, and what is inside."""

import io
import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SIZES, opened
from PIL import Image

import elit
from elit.cli.main import main
from elit.evaluate.inspect.attention import read_attention
from elit.models.presets import create_model
from elit.play.dial import Dial
from elit.play.engine import Cancelled, NetworkEngine
from elit.play.inside import attention_maps, latents_that_matter, trajectory
from elit.play.opening import Opening
from elit.play.pictures import difference, evenly, overlay
from elit.play.planning import dial_of_plan, plan_for


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    torch.manual_seed(0)
    sizes = SIZES | {"in_channels": 3, "num_classes": 5, "split": (1, 2, 1), "window": (4, 4)}
    model = create_model("ELIT-DiT-S/2", **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("play") / "model"
    model.save_pretrained(folder)
    return NetworkEngine.load(str(folder), vae=None, device="cpu", dtype="float32")


def settings(**changes):
    return Dial(**{"condition": "3", "budgets": (4, 16, 16), "steps": 3} | changes).settings(takes_text=False)


@pytest.fixture(scope="module")
def picture(engine):
    return engine.generate(settings(seed=5, guidance="ccfg", scale=2))


def test_a_downloaded_picture_is_made_again_byte_for_byte(picture, tmp_path):
    (tmp_path / "a.png").write_bytes(picture.file)
    assert main(["sample", "--like", str(tmp_path / "a.png"), "--out", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_picture_is_that_of_sample(engine, picture):
    expected = elit.sample(engine.model, [3], steps=3, budget=4, guidance=elit.CCFG(2, 1), seed=5)
    assert torch.equal(picture.pixels, expected[0])
    assert torch.equal(picture.states[-1][1], expected)
    assert [t for t, _ in picture.states] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert Image.open(io.BytesIO(picture.file)).size == (64, 64)


def test_the_page_opens_with_what_its_settings_give_and_with_a_picture_of_every_class(engine, monkeypatch):
    opening = Opening(engine)
    first = opening.picture(opening.settings)
    assert first.file == engine.generate(opening.settings).file
    assert first.settings == opening.dial.settings(takes_text=False)
    assert opening.picture(replace(opening.settings, seed=1)) is None  # drawn like any other
    thumbnails = opening.thumbnails()
    assert [name for _, name in thumbnails] == list(engine.classes)
    alone = engine.generate(replace(opening.settings, steps=8, budget="25%", labels=("2",), seed=2)).image()
    assert np.abs(np.asarray(thumbnails[2][0], int) - np.asarray(alone, int)).max() <= 1
    monkeypatch.setattr(NetworkEngine, "thumbnails", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # not lost in its thread
        Opening(engine).thumbnails()


def test_costs_are_the_closed_forms_and_times_are_measured(engine, picture):
    cost = engine.cost(picture.settings)
    assert cost.gflops == picture.gflops < cost.full_gflops
    assert cost.measured_ms == picture.ms
    assert engine.cost(settings(steps=9)).measured_ms is None
    assert (cost.metric, cost.quality, cost.predicted_ms) == (None, None, None)


def test_a_sweep_beside_the_model_gives_the_expected_quality(engine, tmp_path):
    from elit.planner.quality import read_quality

    row = {"budget": "4", "guidance": "none", "scale": 1.0, "guidance_budget": None, "count": 96, "detector": "digits"}
    rows = [row | {"steps": steps, "fd": value} for steps, value in ((2, 8.0), (8, 4.0))]
    (tmp_path / "sweep.jsonl").write_text("\n".join(map(json.dumps, rows)))
    engine = NetworkEngine(name="x", model=engine.model, table=read_quality(tmp_path / "sweep.jsonl"))
    assert engine.quality(settings(steps=2)) == 8
    assert engine.quality(settings(steps=4)) == pytest.approx(6)
    assert engine.quality(settings(steps=16)) is None
    assert engine.quality(settings(steps=2, budgets=(8,) * 3)) is None
    assert engine.quality(settings(steps=2, guidance="cfg")) is None


def test_what_does_not_fit_is_one_line_and_a_run_can_be_stopped(engine):
    for wrong, message in ((settings(condition="boot"), "boot"), (settings(condition="7"), "7")):
        with pytest.raises(ValueError, match=message):
            engine.check(wrong)
    with pytest.raises(ValueError, match="guidance ag: its budget 8 is above"):
        engine.cost(settings(guidance="ag", guidance_budget=8))
    stop, ticks = threading.Event(), []

    def tick(done, total):
        ticks.append((done, total))
        stop.set()

    with pytest.raises(Cancelled):
        engine.generate(settings(steps=9), tick, stop)
    assert ticks == [(0, 9)]
    assert engine.generate(settings(steps=1)).ms > 0  # the lock is free again


def test_inside_is_what_the_network_read(engine, picture):
    times, maps = attention_maps(engine, picture)
    assert maps.shape == (3, 4, 8, 8)
    t, x = picture.states[1]
    assert times[1] == t
    torch.testing.assert_close(maps[1], read_attention(engine.model, x, torch.tensor([t]), torch.tensor([3]), 4)[0])
    shares = latents_that_matter(engine, picture)
    assert [name for name, _ in shares] == ["1", "2", "3", "4"]
    assert all(share > 0 for _, share in shares)
    frames = trajectory(engine, picture)
    assert [words for _, words in frames] == ["t = 0.00", "t = 0.33", "t = 0.67", "t = 1.00"]
    assert overlay(picture.image(), maps[0, 0]).size == (384, 384)
    with pytest.raises(ValueError, match="nothing to leave out"):
        latents_that_matter(engine, engine.generate(settings(steps=1, budgets=(1,) * 3)))


def test_a_plan_moves_the_dial(engine):
    found = plan_for(engine, "target_gflops", engine.gflops(settings(steps=6)))
    dial = dial_of_plan(Dial(condition="2", budgets=(16,) * 3), found, engine.budgets)
    assert engine.gflops(dial.settings(takes_text=False)) == pytest.approx(found.gflops)
    with pytest.raises(ValueError, match="the least possible here"):
        plan_for(engine, "target_gflops", 1e-9)


@pytest.mark.slow
def test_a_target_in_milliseconds_measures_this_machine_first(engine, monkeypatch):
    monkeypatch.setattr("elit.play.planning.SECONDS", 0.0)
    monkeypatch.setattr(engine, "profile", None)
    ticks = []
    best = plan_for(engine, "target_ms", 10_000, lambda done, total: ticks.append((done, total)))
    assert ticks
    assert engine.profile is not None
    assert 0 < best.ms <= 10_000
    assert engine.cost(settings()).predicted_ms > 0
    with pytest.raises(ValueError, match="the least possible here"):
        plan_for(engine, "target_ms", 1e-6)


@pytest.mark.parametrize("kind", ["elit-dit-video", "elit-mmdit", "dit"])
def test_clips_texts_and_baselines(kind):
    model = opened(kind)
    if model.config.in_channels == 4:
        with pytest.raises(ValueError, match="its samples are no pictures"):
            NetworkEngine(name="x", model=model)
    from conftest import SETTINGS

    name, sizes = SETTINGS[kind]
    engine = NetworkEngine(name="x", model=create_model(name, **sizes | {"in_channels": 3}).eval())
    dial = Dial(condition="a one" if engine.takes_text else "1", budgets=engine.budgets[-1:] * 3, steps=1)
    picture = engine.generate(dial.settings(takes_text=engine.takes_text))
    assert picture.suffix == (".gif" if engine.clips else ".png")
    assert engine.can_look_inside == (kind != "dit")
    if engine.can_look_inside:
        assert attention_maps(engine, picture)[1].ndim == 4
    assert len(trajectory(engine, picture)) == 2
    assert len(engine.classes) == (0 if engine.takes_text else 5)


def test_a_pipeline_with_a_dial(tmp_path):
    from elastic.tiny import open_branches, pipeline

    from elit.elastic.stock import find_stock
    from elit.play.pipeline_engine import PipelineEngine

    pipe = pipeline("DiTPipeline")
    open_branches(elit.elastify(pipe.transformer, read_after=1, write_after=3, window=(4, 4)))
    pipe.save_pretrained(tmp_path / "pipe")
    engine = PipelineEngine.load(find_stock(tmp_path / "pipe"), device="cpu", dtype="float32")
    assert engine.start == {"condition": "0", "guidance": "cfg", "scale": 4.0}
    assert engine.guidances == ("none", "cfg", "ccfg")
    dial = Dial(condition="7", budgets=(4,) * 3, steps=2, seed=5, guidance="ccfg", scale=3)
    wanted = dial.settings(takes_text=False)
    ticks = []
    picture = engine.generate(wanted, lambda done, total: ticks.append((done, total)))
    assert ticks == [(1, 2), (2, 2)]
    with elit.budget(4, guidance=1):
        right = pipe([7], 3.0, torch.Generator().manual_seed(5), num_inference_steps=2).images[0]
    assert np.array_equal(np.asarray(picture.image()), np.asarray(right))
    cost = engine.cost(wanted)
    assert cost.gflops == picture.gflops < cost.full_gflops
    assert cost.measured_ms == picture.ms
    (tmp_path / "a.png").write_bytes(picture.file)
    assert main(["sample", "--like", str(tmp_path / "a.png"), "--out", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    for wrong, message in ((dial, "labels='1000'|classes are 0 to 999"), (dial, "guidance=ag")):
        changes = {"condition": "1000"} if "labels" in message else {"guidance": "ag"}
        settings = replace(wrong, **changes).settings(takes_text=False)
        ask = engine.check if "labels" in message else engine.cost
        with pytest.raises(ValueError, match=message):
            ask(settings)
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        engine.generate(wanted, stop=stop)


def test_differences_and_even_choices():
    image, largest = difference(torch.zeros(1, 4, 4), torch.full((1, 4, 4), 0.5))
    assert largest == pytest.approx(0.25)
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert evenly(10, 4) == [0, 3, 6, 9]
    assert evenly(3, 4) == [0, 1, 2]
