"""A running service for the page: an HTTP client, its load read from /metrics, bounded bursts of requests."""

import asyncio
import json
import random
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import NamedTuple

import httpx
from prometheus_client.parser import text_string_to_metric_families

from elit.config import require
from elit.files import Json
from elit.serve.loadtest import Arrival, Outcome, run_loadtest, summarize

TIMEOUT = 70.0
"""Seconds."""
CALM_BEFORE, CALM_AFTER = 2, 12
"""Seconds before and after a burst with one request each."""
HISTORY, MIN_INTERVAL = 120, 0.5
"""Number of readings kept, and the least seconds between two."""


class ServiceClient:
    """HTTP client of `elit serve`. url: with or without /v1. key: the service's API key, if it has one."""

    def __init__(self, url: str, key: str | None = None):
        """Raises ValueError for an invalid URL."""
        require(url.startswith(("http://", "https://")), "service", url, "http://HOST:PORT")
        self.url, self.key = url.rstrip("/").removesuffix("/v1"), key

    async def ask(self, path: str, body: Json | None = None) -> bytes:
        """The content of the answer to a GET, or to a POST of `body`. Cancelling closes the connection.

        Raises ValueError with the service's message for a refusal, and where nothing answers.
        """
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            async with httpx.AsyncClient(base_url=self.url, headers=headers, timeout=TIMEOUT, trust_env=False) as http:
                answer = await http.request("GET" if body is None else "POST", path, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ValueError(f"service {self.url!r} does not answer ({type(error).__name__})") from None
        if answer.status_code != 200:
            is_json = answer.headers.get("content-type") == "application/json"
            message = answer.json()["error"]["message"] if is_json else answer.text[:200]
            hint = "; set --api-key or ELIT_API_KEY" if answer.status_code == 401 else ""
            raise ValueError(f"the service answered {answer.status_code}: {message}{hint}")
        return answer.content

    def describe(self) -> Json:
        """The served model: {"id", "elit": its request options}. Raises ValueError."""
        try:
            (model,) = json.loads(asyncio.run(self.ask("/v1/models")))["data"]
            return {"id": str(model["id"]), "elit": dict(model["elit"])}
        except (KeyError, TypeError, json.JSONDecodeError):
            raise ValueError(f"service {self.url!r} is not an elit serve") from None


class Reading(NamedTuple):
    """A service's load at one time; means are since the last reading, None without images or answers."""

    at: float  # seconds of a monotonic clock
    unanswered: float  # requests
    waiting: float  # of those, in the queues of the replicas at their last report
    budget: float | None  # mean latents per group of the images
    latency_ms: float | None  # mean of the answers


class LoadMonitor:
    """The latest readings of a service, shared by all visitors, and one burst at a time."""

    def __init__(self, client: ServiceClient):
        self.client, self.readings = client, deque[Reading](maxlen=HISTORY)
        self._sums: dict[str, float] = {}
        self._reading, self.bursting = threading.Lock(), threading.Lock()

    def read(self) -> list[Reading]:
        """The readings, with a new one if the last is old enough. Raises ValueError where the service is silent."""
        with self._reading:
            now = time.monotonic()
            if not self.readings or now - self.readings[-1].at >= MIN_INTERVAL:
                self.readings.append(self._parse(now, asyncio.run(self.client.ask("/metrics")).decode()))
            return list(self.readings)

    def _parse(self, now: float, text: str) -> Reading:
        sums = defaultdict[str, float](float)
        for family in text_string_to_metric_families(text):
            for name, labels, value, *_ in family.samples:
                if name == "elit_images_total" and labels["budget"].isdecimal():
                    sums["images"] += value
                    sums["latents"] += value * int(labels["budget"])
                sums[name] += value
        before, self._sums = self._sums, dict(sums)

        def mean(*names: str) -> float | None:
            total, count = (max(0.0, sums[name] - before.get(name, sums[name])) for name in names)
            return total / count if count else None

        unanswered, seconds = sums["elit_in_flight"], mean("elit_latency_seconds_sum", "elit_latency_seconds_count")
        waiting, latency = min(sums["elit_queue_length"], unanswered), None if seconds is None else 1e3 * seconds
        return Reading(now, unanswered, waiting, mean("latents", "images"), latency)

    def burst(
        self, requests: int, seconds: int, deadline_ms: float, tick: Callable[[int, int], None] | None = None
    ) -> list[Outcome]:
        """Sends requests at random times within `seconds`, one a second before and after, and waits for all answers.

        Raises ValueError while another burst runs.
        """
        if not self.bursting.acquire(blocking=False):
            raise ValueError("cannot start a burst: another one is running")
        try:
            info = self.client.describe()["elit"]
            prompts = ["a picture"] if info["text"] else [str(number) for number in range(info["classes"])]
            end = CALM_BEFORE + seconds
            at = [*range(CALM_BEFORE), *range(end, end + CALM_AFTER)]
            at += [random.uniform(CALM_BEFORE, end) for _ in range(requests)]
            trace = [Arrival(at=float(each)) for each in sorted(at)]
            key = self.client.key
            return run_loadtest(
                self.client.url, trace, prompts=prompts, deadline_ms=deadline_ms, key=key, progress=tick
            )
        finally:
            self.bursting.release()


def describe_burst(outcomes: list[Outcome]) -> str:
    """The outcome of a burst in a sentence."""
    summary = summarize(outcomes)
    text = f"{len(outcomes)} requests: {summary['refused']:.0%} refused, {summary['late']:.0%} late"
    if summary["p50_ms"] is None:
        return f"{text}."
    return f"{text}; median latency {summary['p50_ms']:.0f} ms, {summary['mean_budget']:.1f} latents on average."
