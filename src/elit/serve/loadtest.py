"""Requests sent to a service when a trace says, whatever became of those before them (an open loop)."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from elit.serve.outcomes import Outcome
from elit.serve.trace import Arrival

GRACE = 30.0
"""Seconds that an answer may take beyond its deadline before the request counts as failed."""


def run_loadtest(
    url: str,
    trace: Sequence[Arrival],
    *,
    prompts: Sequence[str],
    deadline_ms: float,
    key: str | None = None,
    body: dict[str, Any] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """What became of every request, in the trace's order.

    url: of the service, without /v1. prompts: in turn. deadline_ms: of arrivals that have none. body: more fields of
    every request. Raises ValueError where nothing answers at `url`.
    """
    return asyncio.run(_run(url, trace, prompts, deadline_ms, key, body or {}, seed, progress))


async def _run(
    url: str,
    trace: Sequence[Arrival],
    prompts: Sequence[str],
    deadline_ms: float,
    key: str | None,
    body: dict[str, Any],
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> list[Outcome]:
    import aiohttp

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(headers=headers, connector=connector) as session:
        try:
            async with session.get(f"{url}/v1/models", timeout=aiohttp.ClientTimeout(total=10)) as answer:
                if answer.status != 200:
                    raise ValueError(f"url={url!r}: answers {answer.status}; {(await answer.text())[:200]}")
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ValueError(f"url={url!r}: no service there ({type(error).__name__})") from None
        start, done = time.perf_counter(), 0

        async def send(place: int, arrival: Arrival) -> Outcome:
            nonlocal done
            patience = deadline_ms if arrival.deadline_ms is None else arrival.deadline_ms
            content = {
                "prompt": prompts[place % len(prompts)],
                "quality": arrival.quality,
                "deadline_ms": patience,
                "seed": seed + place,
            } | body
            await asyncio.sleep(max(0.0, start + arrival.at - time.perf_counter()))
            sent = time.perf_counter()
            status, report = 0, dict[str, Any]()
            try:
                timeout = aiohttp.ClientTimeout(total=patience / 1e3 + GRACE)
                path = f"{url}/v1/images/generations"
                async with session.post(path, json=content, timeout=timeout) as answer:
                    status = answer.status
                    text = await answer.text()
                    report = json.loads(text).get("elit", {}) if status == 200 else {}
            except (aiohttp.ClientError, TimeoutError, ValueError):
                pass  # status 0: no answer
            finish = time.perf_counter() - start
            done += 1
            if progress:
                progress(done, len(trace))
            return Outcome(
                arrival=sent - start,
                deadline=sent - start + patience / 1e3,
                finish=finish if status == 200 else None,
                status=status,
                budget=report.get("budget"),
                steps=report.get("steps"),
                queue_ms=report.get("queue_ms"),
                compute_ms=report.get("compute_ms"),
            )

        return list(await asyncio.gather(*(send(place, arrival) for place, arrival in enumerate(trace))))
