"""The page on a service: its pictures, its load as readings, a bounded burst."""

import time

import numpy as np
import pytest
from serve.service import saved_model, served

import elit
from elit.cli.main import main
from elit.play.renderer import Cancelled, Renderer
from elit.play.request import Request
from elit.play.service import LoadMonitor, ServiceClient, describe_burst
from elit.play.service_engine import ServiceEngine
from elit.sampling.pictures import sheet_frames
from elit.serve.measure import load_replica
from elit.serve.settings import ServiceSettings

pytestmark = pytest.mark.slow

KEY = "a-key-of-tests"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("watched") / "digits")


@pytest.fixture(scope="module")
def service(folder):
    settings = ServiceSettings(model=str(folder), name="digits", steps=4, max_batch=2, deadline_ms=60_000, threads=1)
    with served(settings, KEY, load_replica(settings)) as (url, replica, _):
        yield ServiceClient(url, KEY), replica


def request(condition="three", **changes):
    return Request(condition, elit.Sampling(**{"budget": 2, "steps": 3} | changes))


def test_pictures_are_the_services_and_cost_what_it_says(service, folder):
    renderer = Renderer(ServiceEngine(service[0]))
    engine = renderer.engine
    assert (engine.budgets, engine.takes_text, engine.classes[3]) == ((1, 2, 3, 4), False, "three")
    wanted = request(seed=5, guidance=elit.CCFG(2, 1))
    picture = renderer.draw(wanted)
    model = elit.load_model(folder)
    own = elit.sample(model, ["three"], steps=3, budget=2, guidance=elit.CCFG(2, 1), seed=5)
    assert np.array_equal(np.asarray(picture.image()), np.asarray(sheet_frames(own, ".png")[0]))
    cost = renderer.cost(wanted)
    gflops = {budget: elit.count_flops(model, budget=budget) / 1e9 for budget in (1, 2, 4)}
    assert cost.gflops == pytest.approx(picture.gflops) == pytest.approx(3 * (gflops[1] + gflops[2]))
    assert cost.full_gflops == pytest.approx(3 * (gflops[1] + gflops[4]))
    assert cost.measured_ms == picture.ms > 0
    for wrong, message in (
        (request("boot"), "ankle boot"),
        (request(budget="2@0-0.5,4@0.5-1"), "same for all steps"),
        (request(guidance=elit.AG(2, 1)), "guidance must be one of none, cfg, ccfg, got ag"),
    ):
        with pytest.raises(ValueError, match=message):
            renderer.cost(wrong)
    with pytest.raises(ValueError, match=r"answered 400: .*ankle boot"):
        renderer.draw(request("boot"))


def test_a_cancelled_run_frees_its_place(service):
    client, replica = service
    slow = replica.engine.step

    def step(running):
        time.sleep(0.1)
        slow(running)

    def tick(done, total):
        if replica.here:
            raise Cancelled

    replica.engine.step = step
    try:
        with pytest.raises(Cancelled):
            Renderer(ServiceEngine(client)).draw(request(steps=60), tick)
    finally:
        replica.engine.step = slow
    end = time.monotonic() + 10
    while replica.here:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_burst_is_bounded_and_seen_in_the_readings(service, monkeypatch):
    monkeypatch.setattr("elit.play.service.CALM_AFTER", 1)
    monitor = LoadMonitor(service[0])
    (first,) = monitor.read()
    assert (first.unanswered, first.budget, first.latency_ms) == (0, None, None)
    assert len(monitor.read()) == 1  # too soon for another
    ticks = []
    outcomes = monitor.burst(12, 1, 30_000, lambda done, total: ticks.append(done))
    assert ticks[-1] == len(outcomes) == 2 + 12 + 1
    assert "latents on average" in describe_burst(outcomes)
    time.sleep(0.5)
    last = monitor.read()[-1]
    assert 1 <= last.budget <= 4
    assert last.latency_ms > 0
    from elit.play.load_tab import load_charts  # with Gradio, which the others do without

    assert load_charts(list(monitor.readings)).count("<svg") == 3
    with monitor.bursting, pytest.raises(ValueError, match="another one is running"):
        monitor.burst(5, 1, 1000)


def test_services_that_cannot_be_used_are_one_line(service, capsys):
    url = service[0].url
    for line, message in (
        (["--service", url, "--api-key", "wrong-key"], "set --api-key"),
        (["--service", "http://127.0.0.1:9"], "does not answer"),
        (["--service", "127.0.0.1"], "service must be http://HOST:PORT"),
        (["--api-key", KEY], "service must be set"),
    ):
        assert main(["play", *line]) == 2
        assert message in capsys.readouterr().err
