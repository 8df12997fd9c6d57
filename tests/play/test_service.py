"""The page on a service: its pictures, its load as readings, a bounded burst."""

import threading
import time

import numpy as np
import pytest
from serve.service import saved_model, served

import elit
from elit.cli.main import main
from elit.play.dial import Dial
from elit.play.engine import Cancelled
from elit.play.pictures import as_image
from elit.play.service import LoadMonitor, ServiceClient, burst_words
from elit.play.service_engine import ServiceEngine
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


def settings(**changes):
    return Dial(**{"condition": "three", "budgets": (2, 4, 4), "steps": 3} | changes).settings(takes_text=False)


def test_pictures_are_the_services_and_cost_what_it_says(service, folder):
    engine = ServiceEngine(service[0])
    assert (engine.budgets, engine.takes_text, engine.classes[3]) == ((1, 2, 3, 4), False, "three")
    wanted = settings(seed=5, guidance="ccfg", scale=2)
    picture = engine.generate(wanted)
    model = elit.load_model(folder)
    own = elit.sample(model, ["three"], steps=3, budget=2, guidance=elit.CCFG(2, 1), seed=5)
    assert np.array_equal(np.asarray(as_image(picture.pixels)), np.asarray(as_image(own[0])))
    cost = engine.cost(wanted)
    assert cost.gflops == pytest.approx(picture.gflops)
    assert cost.measured_ms == picture.ms > 0
    assert engine.generate(settings(budgets=(4, 4, 4))).gflops == pytest.approx(cost.full_gflops - 3 * gflops(model, 1))
    for changes, message in (
        ({"condition": "boot"}, "ankle boot"),
        ({"pieces": 2, "knots": (0.5, 0.7)}, "one budget for all steps"),
        ({"guidance": "ag"}, "this service has none, cfg, ccfg"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.check(settings(**changes))
    with pytest.raises(ValueError, match="answers 400: num_inference_steps=200"):
        engine.generate(settings(steps=200))


def gflops(model, budget):
    return elit.count_flops(model, budget=budget) / 1e9


def test_a_cancelled_run_frees_its_place(service):
    client, replica = service
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    slow = replica.engine.step

    def step(running):
        time.sleep(0.1)
        slow(running)

    replica.engine.step = step
    try:
        with pytest.raises(Cancelled):
            ServiceEngine(client).generate(settings(steps=100), stop=stop)
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
    assert "served, with " in burst_words(outcomes)
    time.sleep(0.5)
    last = monitor.read()[-1]
    assert 1 <= last.budget <= 4
    assert last.latency_ms > 0
    from elit.play.load_tab import load_charts  # with Gradio, which the others do without

    assert load_charts(list(monitor.readings)).count("<svg") == 3
    for wrong in ((65, 1, 1000), (1, 11, 1000), (0, 1, 1000), (5, 1, 1e9)):
        with pytest.raises(ValueError, match="a burst has 1 to 64 requests"):
            monitor.burst(*wrong)
    with monitor._bursting, pytest.raises(ValueError, match="a burst is running"):
        monitor.burst(5, 1, 1000)


def test_what_is_no_service_is_one_line(service, capsys):
    url = service[0].url
    for line, message in (
        (["--service", url, "--api-key", "wrong-key"], "asks for a key"),
        (["--service", "http://127.0.0.1:9"], "does not answer"),
        (["--service", "127.0.0.1"], "give http://HOST:PORT"),
        (["--api-key", KEY], "give --service too"),
    ):
        assert main(["play", *line]) == 2
        assert message in capsys.readouterr().err
