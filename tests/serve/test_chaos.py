"""A bad half minute in three seconds: twice the load, clients that leave, a slow step; the long one is a benchmark."""

import asyncio
import random
import time

import aiohttp
import pytest
from service import saved_model, served

import elit
from elit.planner.cost import Costs
from elit.sampling.engine import NetworkEngine
from elit.serve.loadtest import arrivals
from elit.serve.replica import Replica
from elit.serve.settings import ServiceSettings

COSTS = Costs(image=10.0, call=10.0, linear=5.0, separate=True)
SECONDS, STALL, DEADLINE = 3, 0.4, 2.0


@pytest.mark.slow
def test_after_overload_leavers_and_a_stall_a_lone_request_has_full_quality(tmp_path, monkeypatch):
    engine = NetworkEngine(elit.load_model(saved_model(tmp_path / "digits")), exact=True)
    service = ServiceSettings(model="digits", steps=4, max_batch=4, deadline_ms=1e3 * DEADLINE)
    replica = Replica(engine, COSTS, service)
    step, begin, stalled, start = engine.step, engine.begin, [], time.monotonic()

    def slow_step(runs):
        """Takes what `COSTS` say, and once far longer."""
        time.sleep(COSTS.step_ms((each.setting, 1) for each in replica.policy.running) / 1e3)
        if not stalled and time.monotonic() - start > SECONDS / 2:
            stalled.append(time.sleep(STALL))
        step(runs)

    monkeypatch.setattr(engine, "step", slow_step)
    monkeypatch.setattr(engine, "begin", lambda *given, **more: time.sleep(COSTS.image / 1e3) or begin(*given, **more))
    ladder = service.ladder(engine.budgets)
    times = arrivals([2 * COSTS.rate(ladder[-1], 4)] * SECONDS, seed=1)
    draw = random.Random(0)

    async def ask(session, url, at):
        patience = draw.uniform(0, 0.3) if draw.random() < 0.2 else 60
        await asyncio.sleep(at)
        try:
            async with asyncio.timeout(patience), session.post(url, json={"prompt": "3"}) as answer:
                return answer.status, await answer.json()
        except TimeoutError:
            return 499, None

    async def run(url):
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            answers = await asyncio.gather(*(ask(session, url, at) for at in times))
            return answers, await ask_alone(session, url)

    async def ask_alone(session, url):
        """At full quality as soon as the queue is empty; seconds that took."""
        since = time.monotonic()
        while True:
            async with session.post(url, json={"prompt": "3"}) as answer:
                body = await answer.json()
            if answer.status == 200 and (body["elit"]["budget"], body["elit"]["steps"]) == (4, 4):
                return time.monotonic() - since

    with served(service, None, replica) as (url, _, app):
        start = time.monotonic()
        answers, recovery = asyncio.run(run(f"{url}/v1/images/generations"))
        statuses = [status for status, _ in answers]
        assert stalled
        assert set(statuses) <= {200, 429, 499}
        assert statuses.count(200) > 0.5 * len(statuses)
        assert 0 < statuses.count(499) < 0.3 * len(statuses)
        assert min(body["elit"]["budget"] for status, body in answers if status == 200) < 4
        assert recovery < 3
        assert not replica._loop_task.done()
        assert not replica.here
        assert app.state.metrics.unanswered() == 0
        assert not app.state.metrics.registry.get_sample_value("elit_requests_total", {"status": "500"})
