"""The loop of a replica: nothing that one request does ends it, and an engine that fails is replaced."""

import asyncio
import time

import pytest
from service import saved_model

import elit
from elit.planner.cost import Costs
from elit.sampling.engine import NetworkEngine
from elit.serve.ladder import measure_costs
from elit.serve.replica import MAX_FAILURES, Replica
from elit.serve.requests import Request
from elit.serve.settings import ServiceSettings

SETTING = elit.Sampling(steps=2, budget=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return elit.load_model(saved_model(tmp_path_factory.mktemp("replica") / "digits"))


@pytest.fixture
def replica(model):
    service = ServiceSettings(model="digits", steps=2, max_batch=4)
    return Replica(NetworkEngine(model, exact=True), Costs(call=1.0, around=1.0), service)


def request(id, prompt="3"):
    now = time.time()
    return Request(id=id, prompt=prompt, arrival=now, deadline=now + 60, settings=(SETTING,))


def test_a_client_that_leaves_while_another_request_begins(replica, monkeypatch):
    begin = replica.engine.begin
    monkeypatch.setattr(replica.engine, "begin", lambda *args, **given: time.sleep(0.2) or begin(*args, **given))

    async def run():
        first, leaving, itself = (asyncio.create_task(replica.generate(request(id))) for id in "abc")
        await asyncio.sleep(0.1)
        leaving.cancel()
        await asyncio.sleep(0.2)
        itself.cancel()  # while its own run begins
        answers = [await first, await replica.generate(request("d"))]
        await replica.alive()
        return answers

    assert all(answer["images"] for answer in asyncio.run(run()))
    assert not replica.here
    assert not replica.policy.running


def test_an_error_of_a_beginning_or_a_run_is_its_own_requests(replica, monkeypatch):
    conditions, step = replica.engine.conditions, replica.engine.step
    faults = {"large": MemoryError("secret"), "wrong": ValueError("no such\nclass")}

    def picky(prompts):
        if prompts[0] in faults:
            raise faults[prompts[0]]
        return conditions(prompts)

    def picky_step(runs):
        step(runs)
        runs[0].error = ValueError("no such word") if len(runs) == 2 else None

    async def run(prompts):
        tasks = [replica.generate(request(f"{place}", prompt)) for place, prompt in enumerate(prompts)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    monkeypatch.setattr(replica.engine, "conditions", picky)
    monkeypatch.setattr(replica.engine, "step", picky_step)
    failed, late, good, invalid = asyncio.run(run(["large", "3", "3", "wrong"]))
    assert (str(failed), late, invalid) == (
        "the engine failed",
        {"invalid": "no such word"},
        {"invalid": "no such class"},
    )
    assert good["images"]


def test_an_engine_whose_every_step_fails_is_unhealthy(replica, monkeypatch):
    def fail(runs):
        raise RuntimeError("secret")

    monkeypatch.setattr(replica.engine, "step", fail)

    async def run():
        for number in range(MAX_FAILURES):
            await replica.alive()
            with pytest.raises(RuntimeError, match="the engine failed"):
                await replica.generate(request(str(number)))
        with pytest.raises(RuntimeError, match="the engine fails"):
            await replica.alive()

    asyncio.run(run())


def test_measuring_goes_on_until_two_rounds_agree(model, monkeypatch):
    rounds, cases = [50.0, 8.0, 4.0, 4.1, 77.0], []

    def time_case(engine, case):
        cases.append(case)
        return [rounds[(len(cases) - 1) // 6]] * 2, 3.0

    monkeypatch.setattr("elit.serve.ladder.time_run", time_case)
    costs = measure_costs(NetworkEngine(model, exact=True), seconds=0)
    assert len(cases) == 4 * 6
    assert costs.step_ms([(SETTING, 1)]) == pytest.approx(4.1, rel=0.01)


def test_costs_that_are_wrong_at_the_start_are_mended(replica, monkeypatch):
    monkeypatch.setattr("elit.serve.replica.REFIT", 8)
    replica.policy.costs = Costs(call=500.0, image=900.0, separate=True)

    async def run():
        return [await replica.generate(request(str(number))) for number in range(5)]

    slowest = max(answer["stages"]["steps_ms"] / 2 for answer in asyncio.run(run()))
    policy = replica.policy
    assert policy.costs.step_ms([(SETTING, 1)]) * policy.slowdown <= 2 * slowest
    assert policy.costs.image * policy.slowdown < 900


@pytest.mark.parametrize("exact", [True, False])
def test_measured_costs_rise_with_latents_and_guidance(model, exact):
    costs = measure_costs(NetworkEngine(model, exact=exact), seconds=0.2)
    guided = elit.Sampling(steps=1, budget=2, guidance=elit.CFG(2.0))
    assert 0 < costs.step_ms([(elit.Sampling(steps=1, budget=2), 1)]) <= costs.step_ms([(guided, 1)])
    assert costs.image > 0
    assert costs.separate == exact
