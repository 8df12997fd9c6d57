"""Load tests: when requests arrive, requests sent at those times (an open loop), and their outcomes.

The bursty shape is that of the Azure Functions trace in DiffServe's evaluation: a slow wave like that of a day, noise
with memory, and bursts that rise within a second or two and fade; arrivals are Poisson inside each second.
"""

import asyncio
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elit.config import require
from elit.files import Json

MAX_ARRIVALS = 1_000_000
GRACE = 30.0
"""Seconds that an answer may take beyond its deadline before the request counts as failed."""
QUALITIES = ("auto", "low", "medium", "high")


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One request of a trace."""

    at: float
    """Seconds from the start."""
    deadline_ms: float | None = None
    """None = the service's own."""
    quality: str = "auto"

    def __post_init__(self) -> None:
        for name, value in (("at", self.at), ("deadline_ms", self.deadline_ms or 0)):
            require(type(value) in (int, float) and 0 <= value < math.inf, name, value, "a number, 0 or more")
        require(self.quality in QUALITIES, "quality", self.quality, f"one of {', '.join(QUALITIES)}")


def bursty_rates(seconds: int, mean: float, seed: int = 0) -> list[float]:
    """Requests a second, one number a second, with `mean` over all; the highest is about twice that."""
    draw = random.Random(f"rates/{seed}")
    phase, noise = draw.uniform(0, 2 * math.pi), 0.0
    shape = []
    for second in range(seconds):
        noise = 0.8 * noise + draw.gauss(0, 0.08)
        wave = 0.35 * math.sin(phase + 2 * math.pi * second / max(seconds, 1))
        shape.append(max(0.1, 1 + wave + noise))
    for _ in range(max(1, seconds // 40)):
        start, height, fade = draw.randrange(seconds), draw.uniform(0.6, 1.2), draw.uniform(3, 8)
        for second in range(start, seconds):
            rise = min(1.0, (second - start + 1) / 2)
            shape[second] += height * rise * math.exp(-(second - start) / fade)
    scale = mean * seconds / sum(shape)
    return [scale * each for each in shape]


def arrivals(rates: Sequence[float], seed: int = 0, **request: Any) -> list[Arrival]:
    """Poisson inside each second. request: deadline_ms and quality of all. Raises ValueError for too many."""
    require(sum(rates) <= MAX_ARRIVALS, "rates", f"{sum(rates):.0f} requests", f"at most {MAX_ARRIVALS} requests")
    draw = random.Random(f"arrivals/{seed}")
    times = []
    for second, rate in enumerate(rates):
        at = draw.expovariate(rate) if rate > 0 else 1.0
        while at < 1:
            times.append(second + at)
            at += draw.expovariate(rate)
    return [Arrival(at=at, **request) for at in times]


def trace_text(trace: Sequence[Arrival]) -> str:
    """One JSON object a line, as `read_trace` reads them."""
    lines = [json.dumps({name: value for name, value in vars(each).items() if value is not None}) for each in trace]
    return "\n".join(lines) + "\n"


def read_trace(path: Path) -> list[Arrival]:
    """The trace in a file of JSON lines. Raises ValueError naming the line that is invalid."""
    if not path.is_file():
        raise ValueError(f"trace={str(path)!r}: no such file; it has one JSON object a line, such as {{'at': 0.25}}")
    trace: list[Arrival] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            trace += [Arrival(**json.loads(line))] if line.strip() else []
        except TypeError:
            reason = "expected at, and optionally deadline_ms and quality"
            raise ValueError(f"trace={str(path)!r}: line {number}: {reason}") from None
        except ValueError as error:
            raise ValueError(f"trace={str(path)!r}: line {number}: {error}") from None
    if not 1 <= len(trace) <= MAX_ARRIVALS:
        raise ValueError(f"trace={str(path)!r}: {len(trace)} requests; it must have 1 to {MAX_ARRIVALS}")
    return sorted(trace, key=lambda arrival: arrival.at)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of one request, measured or simulated. Times are seconds from the start of the run."""

    arrival: float
    deadline: float
    finish: float | None = None
    """None where it was refused or failed."""
    status: int = 200
    """HTTP status: 200, 429 or 503; 0 without an answer."""
    budget: int | None = None
    """Latents per group it was served with."""
    steps: int | None = None
    queue_ms: float | None = None
    compute_ms: float | None = None

    @property
    def met(self) -> bool:
        return self.finish is not None and self.finish <= self.deadline


def run_loadtest(
    url: str,
    trace: Sequence[Arrival],
    *,
    prompts: Sequence[str],
    deadline_ms: float,
    key: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """Sends every request at its time and waits for all answers; outcomes are in the trace's order.

    url: of the service, without /v1. prompts: in turn. deadline_ms: of arrivals without one. Raises ValueError where
    no service answers at `url`.
    """
    import aiohttp

    done = 0

    async def send(session: aiohttp.ClientSession, start: float, place: int, arrival: Arrival) -> Outcome:
        nonlocal done
        patience = deadline_ms if arrival.deadline_ms is None else arrival.deadline_ms
        body = {"prompt": prompts[place % len(prompts)], "quality": arrival.quality}
        body |= {"deadline_ms": patience, "seed": seed + place}
        await asyncio.sleep(max(0.0, start + arrival.at - time.perf_counter()))
        sent = time.perf_counter() - start
        status, report = 0, Json()
        try:
            timeout = aiohttp.ClientTimeout(total=patience / 1e3 + GRACE)
            async with session.post(f"{url}/v1/images/generations", json=body, timeout=timeout) as answer:
                status, text = answer.status, await answer.text()
                report = json.loads(text).get("elit", {}) if status == 200 else {}
        except (aiohttp.ClientError, TimeoutError, ValueError):
            pass  # status 0: no answer
        finish = time.perf_counter() - start if status == 200 else None
        done += 1
        if progress:
            progress(done, len(trace))
        served = {name: report.get(name) for name in ("budget", "steps", "queue_ms", "compute_ms")}
        return Outcome(arrival=sent, deadline=sent + patience / 1e3, finish=finish, status=status, **served)

    async def run() -> list[Outcome]:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:
            try:
                async with session.get(f"{url}/v1/models", timeout=aiohttp.ClientTimeout(total=10)) as answer:
                    if answer.status != 200:
                        raise ValueError(f"url={url!r}: answers {answer.status}; {(await answer.text())[:200]}")
            except (aiohttp.ClientError, TimeoutError) as error:
                raise ValueError(f"url={url!r}: no service there ({type(error).__name__})") from None
            start = time.perf_counter()
            return await asyncio.gather(*(send(session, start, i, arrival) for i, arrival in enumerate(trace)))

    return asyncio.run(run())


def summarize(outcomes: Sequence[Outcome], quality: Callable[[Outcome], float] | None = None) -> Json:
    """Violations (refused, failed or late) as a share, latencies of the served in ms, mean budget, goodput.

    quality: of an answer, such as a sweep's metric at its budget; averaged over the served.
    """
    served = [(each.finish, each) for each in outcomes if each.finish is not None]
    latency = sorted(1e3 * (finish - each.arrival) for finish, each in served)
    begin = min((each.arrival for each in outcomes), default=0.0)
    span = max((each.finish or each.arrival for each in outcomes), default=0.0) - begin
    met, total = sum(each.met for each in outcomes), max(1, len(outcomes))
    summary: Json = {
        "requests": len(outcomes),
        "violations": 1 - met / total if outcomes else 0.0,
        "refused": (len(outcomes) - len(served)) / total,
        "late": (len(served) - met) / total,
        "p50_ms": percentile(latency, 0.50),
        "p99_ms": percentile(latency, 0.99),
        "mean_budget": mean([each.budget for _, each in served if each.budget is not None]),
        "mean_steps": mean([each.steps for _, each in served if each.steps is not None]),
        "goodput": met / span if span > 0 else 0.0,
    }
    return summary | ({"mean_quality": mean([quality(each) for _, each in served])} if quality else {})


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """The least value that `share` of the ascending ones do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def over_time(
    outcomes: Sequence[Outcome], bins: int = 60, quality: Callable[[Outcome], float] | None = None
) -> list[dict[str, float | None]]:
    """Load, budget, latency and violations in even pieces of the run, by arrival. quality: as in `summarize`."""
    if not outcomes:
        return []
    width = max(max(each.arrival for each in outcomes) / bins, 1e-9)
    names = {"budget": "mean_budget", "steps": "mean_steps", "p50_ms": "p50_ms", "violations": "violations"}
    names |= {"quality": "mean_quality"} if quality else {}
    rows = []
    for number in range(bins):
        here = [each for each in outcomes if number == min(bins - 1, int(each.arrival / width))]
        summary = summarize(here, quality)
        values = {name: summary[source] for name, source in names.items()}
        rows.append({"at": (number + 0.5) * width, "rate": len(here) / width} | values)
    return rows
