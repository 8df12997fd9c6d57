"""Load tests: Poisson arrivals, requests sent at those times however long earlier ones take, and their outcomes."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from statistics import fmean

import numpy as np

from elit.files import Json

GRACE = 30.0  # Seconds that an answer may take beyond its deadline before the request counts as failed.


def arrivals(rates: Sequence[float], seed: int = 0) -> list[float]:
    """Times in seconds, Poisson inside each second. rates: requests a second, one number a second."""
    draw = random.Random(f"arrivals/{seed}")
    times = []
    for second, rate in enumerate(rates):
        at = draw.expovariate(rate)
        while at < 1:
            times.append(second + at)
            at += draw.expovariate(rate)
    return times


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of one request, measured or simulated. Times are seconds from the start of the run."""

    arrival: float
    deadline: float
    finish: float | None = None  # None where it was refused or failed
    status: int = 200  # HTTP status; 0 without an answer
    budget: int | None = None  # latents per window it was served with
    steps: int | None = None

    @property
    def met(self) -> bool:
        return self.finish is not None and self.finish <= self.deadline


def run_loadtest(
    url: str,
    times: Sequence[float],
    *,
    prompts: Sequence[str],
    deadline_ms: float,
    quality: str = "auto",
    key: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """Sends a request at each of `times` and waits for all answers; outcomes are in the same order."""
    import aiohttp

    done = count(1)

    async def send(session: aiohttp.ClientSession, start: float, place: int) -> Outcome:
        body = {"prompt": prompts[place % len(prompts)], "quality": quality}
        body |= {"deadline_ms": deadline_ms, "seed": seed + place}
        await asyncio.sleep(max(0.0, start + times[place] - time.perf_counter()))
        sent = time.perf_counter() - start
        status, report = 0, Json()
        try:
            timeout = aiohttp.ClientTimeout(total=deadline_ms / 1e3 + GRACE)
            async with session.post(f"{url}/v1/images/generations", json=body, timeout=timeout) as answer:
                status = answer.status
                report = (await answer.json()).get("elit", {}) if status == 200 else {}
        except (aiohttp.ClientError, TimeoutError, ValueError):
            pass  # status 0: no answer
        finish = time.perf_counter() - start if status == 200 else None
        if progress:
            progress(next(done), len(times))
        how = {name: report.get(name) for name in ("budget", "steps")}
        return Outcome(arrival=sent, deadline=sent + deadline_ms / 1e3, finish=finish, status=status, **how)

    async def run() -> list[Outcome]:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:
            try:
                timeout = aiohttp.ClientTimeout(total=10)
                (await session.get(f"{url}/v1/models", timeout=timeout, raise_for_status=True)).close()
            except (aiohttp.ClientError, TimeoutError) as error:
                raise ValueError(f"url={url!r}: no service there ({error})") from None
            start = time.perf_counter()
            return await asyncio.gather(*(send(session, start, place) for place in range(len(times))))

    return asyncio.run(run())


def summarize(outcomes: Sequence[Outcome]) -> Json:
    """Violations (refused, failed, late) as a share, latencies of the served in ms, mean budget and steps, goodput."""
    served = [each for each in outcomes if each.finish is not None]
    latency = [1e3 * ((each.finish or 0.0) - each.arrival) for each in served]
    budgets = [each.budget for each in served if each.budget is not None]
    begin = min((each.arrival for each in outcomes), default=0.0)
    end = max((each.finish or each.arrival for each in outcomes), default=0.0)
    met, total = sum(each.met for each in outcomes), max(1, len(outcomes))
    p50, p99 = np.quantile(latency, (0.5, 0.99), method="inverted_cdf").tolist() if latency else (None, None)
    return {
        "requests": len(outcomes),
        "violations": (len(outcomes) - met) / total,
        "refused": (len(outcomes) - len(served)) / total,
        "late": (len(served) - met) / total,
        "p50_ms": p50,
        "p99_ms": p99,
        "mean_budget": fmean(budgets) if budgets else None,
        "mean_steps": fmean(each.steps or 0 for each in served) if served else None,
        "goodput": met / max(end - begin, 1e-9),
    }
