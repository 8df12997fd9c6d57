"""The page's renderer: the pictures of `elit sample`, their cost and the inside of their runs; requests as links."""

import json
from dataclasses import replace
from urllib.parse import parse_qsl, urlencode

import numpy as np
import pytest
import torch
from conftest import fresh, opened
from PIL import Image
from serve.service import row
from tiny import open_branches, pipeline

import elit
from elit.cli.main import main
from elit.elastic.engine import load_engine
from elit.evaluate.inspect.attention import read_attention
from elit.planner.quality import read_quality
from elit.play.renderer import Cancelled, Renderer, Request, attention_maps, difference, overlay, trajectory
from elit.sampling.engine import NetworkEngine


@pytest.fixture(scope="module")
def renderer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("play") / "model"
    opened("elit-dit", in_channels=3).save_pretrained(folder)
    return Renderer(load_engine(str(folder), device="cpu", dtype="float32"), "float32")


def request(condition="3", **changes):
    return Request(condition, elit.Sampling(**{"budget": 4, "steps": 3, "dtype": "float32"} | changes))


@pytest.fixture(scope="module")
def picture(renderer):
    return renderer.draw(request(seed=5, guidance=elit.CCFG(2.0, 1)))


def assert_repeated(file, folder):
    (folder / "a.png").write_bytes(file)
    assert main(["sample", "--like", str(folder / "a.png"), "--out", str(folder / "b.png")]) == 0
    assert (folder / "a.png").read_bytes() == (folder / "b.png").read_bytes()


def test_a_picture_is_that_of_sample(renderer, picture, tmp_path):
    expected = elit.sample(renderer.network, [3], steps=3, budget=4, guidance=elit.CCFG(2.0, 1), seed=5)
    assert torch.equal(picture.states[-1][1], expected)
    assert [t for t, _ in picture.states] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert picture.image().size == (64, 64)
    assert_repeated(picture.file, tmp_path)
    cost = renderer.cost(picture.request)
    assert cost.gflops == picture.gflops < cost.full_gflops
    assert (cost.measured_ms, renderer.cost(request(steps=9)).measured_ms) == (picture.ms, None)
    assert (cost.metric, cost.quality, cost.predicted_ms) == (None, None, None)


def test_every_class_has_a_thumbnail(renderer):
    assert renderer.start == request("0", steps=40, budget=16)
    thumbnails = renderer.thumbnails()
    assert renderer.thumbnails() is thumbnails
    assert [name for _, name in thumbnails] == list(renderer.engine.classes)
    alone = renderer.draw(request("2", steps=8, budget=0.25, seed=2)).image()
    assert np.abs(np.asarray(thumbnails[2][0], int) - np.asarray(alone, int)).max() <= 1


def test_a_sweep_gives_the_expected_quality_and_the_opening_settings(renderer, tmp_path, monkeypatch):
    settings = [("4", 2, 8.0), ("4", 8, 4.0), ("16", 4, 5.0), ("16", 6, 3.0, "cfg", 1.5)]
    (tmp_path / "sweep.jsonl").write_text("\n".join(json.dumps(row(*each)) for each in settings))
    monkeypatch.setattr("elit.planner.quality.find_table", lambda folder: tmp_path / "sweep.jsonl")
    swept = Renderer(renderer.engine)
    assert swept.table == read_quality(tmp_path / "sweep.jsonl")
    assert swept.start.sampling == elit.Sampling(steps=6, budget=16, guidance=elit.CFG(1.5))
    assert swept.cost(swept.start).quality == 3
    assert swept.quality(request(steps=2).sampling) == 8
    assert swept.quality(request(steps=4, budget="25%@0-0.5,4@0.5-1").sampling) == pytest.approx(6)
    for unknown in (request(steps=16), request(steps=2, budget=8), request(steps=2, guidance=elit.CFG(2))):
        assert swept.quality(unknown.sampling) is None


def test_invalid_requests_are_one_line_and_a_run_can_be_stopped(renderer):
    for wrong, message in ((request("boot"), "boot"), (request("7"), "7"), (request(guidance=elit.AG(2, 8)), "8")):
        with pytest.raises(ValueError, match=message):
            renderer.cost(wrong)

    def tick(done, total):
        if (done, total) == (2, 9):
            raise Cancelled

    with pytest.raises(Cancelled):
        renderer.draw(request(steps=9), tick)
    assert renderer.draw(request(steps=1)).ms > 0  # the lock is free again


def test_inside_is_what_the_network_read(renderer, picture):
    times, maps = attention_maps(renderer.engine, picture)
    assert maps.shape == (3, 4, 8, 8)
    t, x = picture.states[1]
    assert times[1] == t
    expected = read_attention(renderer.network, x, torch.tensor([t]), torch.tensor([3]), 4)[0]
    torch.testing.assert_close(maps[1], expected)
    frames = trajectory(renderer.engine, picture)
    assert [text for _, text in frames] == ["t = 0.00", "t = 0.33", "t = 0.67", "t = 1.00"]
    assert overlay(picture.image(), maps[0, 0]).size == (384, 384)
    image, largest = difference(Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (51, 0, 0)))
    assert largest == pytest.approx(0.2)
    assert image.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.slow
def test_a_plan_keeps_to_its_target_and_measures_this_machine_first_for_one_in_milliseconds(renderer, monkeypatch):
    target = renderer.engine.gflops(request(steps=6).sampling)
    best = renderer.plan(target, None, print)
    assert best.gflops <= target
    assert renderer.engine.gflops(best) == pytest.approx(best.gflops)
    with pytest.raises(ValueError, match="least possible"):
        renderer.plan(1e-9, None, print)
    monkeypatch.setattr("elit.play.renderer.PROFILE_SECONDS", 0.0)
    monkeypatch.setattr(renderer, "profile", None)
    assert 0 < renderer.plan(None, 10_000, print).ms <= 10_000
    assert renderer.cost(request()).predicted_ms > 0


@pytest.mark.parametrize("kind", ["elit-dit-video", "elit-mmdit", "dit"])
def test_clips_texts_and_baselines(kind):
    renderer = Renderer(NetworkEngine(fresh(kind, in_channels=3).eval()))
    sampling = replace(renderer.start.sampling, steps=1)
    picture = renderer.draw(Request(renderer.start.condition, sampling))
    assert picture.suffix == (".gif" if kind == "elit-dit-video" else ".png")
    if kind != "dit":
        assert attention_maps(renderer.engine, picture)[1].ndim == 4
    assert len(trajectory(renderer.engine, picture)) == 2
    assert len(renderer.thumbnails()) == (0 if kind == "elit-mmdit" else 5)
    with pytest.raises(ValueError, match="they are latents"):
        Renderer(NetworkEngine(fresh(kind)))


def test_a_pipeline_with_a_dial(tmp_path):
    pipe = pipeline("DiTPipeline")
    open_branches(elit.elastify(pipe.transformer, read_after=1, write_after=3, window=(4, 4)))
    pipe.save_pretrained(tmp_path / "pipe")
    renderer = Renderer(load_engine(str(tmp_path / "pipe"), device="cpu", dtype="float32"), "float32")
    assert renderer.start == request("0", steps=40, budget=16, guidance=elit.CFG(4.0))
    wanted = request("7", steps=2, seed=5, guidance=elit.CCFG(3.0, 1))
    ticks = []
    picture = renderer.draw(wanted, lambda done, total: ticks.append((done, total)))
    assert ticks == [(0, 2), (1, 2)]
    with elit.budget(4, guidance=1):
        expected = pipe([7], 3.0, torch.Generator().manual_seed(5), num_inference_steps=2).images[0]
    assert np.array_equal(np.asarray(picture.image()), np.asarray(expected))
    assert renderer.cost(wanted).gflops == picture.gflops
    assert not renderer.shows_classes  # there are 1,000
    assert_repeated(picture.file, tmp_path)
    for wrong in (request("1000"), request("7", guidance=elit.AG(3, 1))):
        with pytest.raises(ValueError, match=r"1000|ag"):
            renderer.cost(wrong)


@pytest.mark.parametrize(
    "wanted",
    [
        request(),
        request("a ☂ & b=c", budget=5, seed=7, steps=3, guidance=elit.CFG(3.5)),
        request(budget="1@0-0.25,8@0.25-0.5,16@0.5-1", guidance=elit.AG(1.5, 2)),
        request(budget="4@0-0.5,16@0.5-1", guidance=elit.CCFG(2, 1)),
    ],
)
def test_links_and_controls_keep_a_request(wanted):
    start = request("3", steps=16, budget=16)
    assert start.updated(dict(parse_qsl(urlencode(wanted.values())))) == wanted
    assert start.updated_by_controls(wanted.controls(range(1, 17))) == wanted
    assert wanted.updated({"of": wanted.condition}) == wanted
    baseline = Request("3", elit.Sampling(steps=16))
    assert baseline.updated({"budget": "full", "steps": "16"}) == baseline
    assert baseline.updated_by_controls(baseline.controls(())) == baseline


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ({"seed": "x"}, "seed must be of type int, got 'x'"),
        ({"seed": "-1"}, "seed must be 0 to 2147483647, got -1"),
        ({"steps": "9999"}, "steps must be 1 to 64, got 9999"),
        ({"guidance": "cfg", "scale": "nan"}, "scale"),
        ({"guidance": "../x"}, r"guidance.*\.\./x"),
        ({"budget": "4@0-0.5"}, "cover t|budget"),
        ({"of": " "}, "the class or prompt must be a text"),
        ({"of": "a" * 3000}, "at most 2000 characters, got '3000"),
    ],
)
def test_an_invalid_link_is_one_line(link, message):
    with pytest.raises(ValueError, match=message):
        request().updated(link).controls(range(1, 17))
