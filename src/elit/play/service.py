"""A running service as the page sees it: asked for pictures, its load read from /metrics, sent a bounded burst."""

import http.client
import json
import random
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from elit.serve.loadtest import Arrival, Outcome, run_loadtest, summarize

TIMEOUT = 70.0
"""Seconds."""
MOST_REQUESTS, MOST_SECONDS = 64, 10
"""Of a burst."""
CALM_BEFORE, CALM_AFTER = 2, 12
"""Seconds around it with a request each."""
HISTORY, LEAST_APART = 120, 0.5
"""How many readings are remembered, and the seconds between two of them at least."""


class ServiceClient:
    """HTTP with a service of `elit serve`. url: without /v1. key: of the service, None where it asks for none."""

    def __init__(self, url: str, key: str | None = None):
        """Raises ValueError for a URL that is none."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"service={url!r}: give http://HOST:PORT")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.key = key

    def ask(self, path: str, body: dict[str, Any] | None = None, stop: threading.Event | None = None) -> bytes:
        """The content of an answer; a POST where there is a body. Once `stop` is set the connection is closed.

        Raises ValueError with the service's own words for a refusal, and where nothing answers.
        """
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(str(parts.hostname), parts.port, timeout=TIMEOUT)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        over = threading.Event()
        try:
            content = None if body is None else json.dumps(body).encode()
            connection.request("GET" if body is None else "POST", parts.path + path, content, headers)
            if stop is not None:
                threading.Thread(target=_close_on, args=(connection, stop, over), daemon=True).start()
            answer = connection.getresponse()
            status, content = answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"service={self.url!r}: does not answer ({type(error).__name__})") from None
        finally:
            over.set()
            connection.close()
        if status == 401:
            raise ValueError(f"service={self.url!r}: asks for a key; give --api-key, or ELIT_API_KEY")
        if status != 200:
            raise ValueError(f"the service answers {status}: {_message(content)}")
        return content

    def describe(self) -> dict[str, Any]:
        """What it serves: {"id", "elit": what clients may ask for}. Raises ValueError."""
        try:
            (model,) = json.loads(self.ask("/v1/models"))["data"]
            return {"id": str(model["id"]), "elit": dict(model["elit"])}
        except (KeyError, TypeError, json.JSONDecodeError):
            raise ValueError(f"service={self.url!r}: is no service of elit serve") from None


def _close_on(connection: Any, stop: threading.Event, over: threading.Event) -> None:
    while not over.wait(0.1):
        if stop.is_set():
            if connection.sock is not None:
                connection.sock.shutdown(2)  # who waits for the answer gets an error, and the service frees the place
            return


def _message(content: bytes) -> str:
    try:
        return str(json.loads(content)["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return content[:100].decode("utf-8", "replace")


@dataclass(frozen=True)
class Reading:
    """A service's load at one time."""

    at: float
    """Seconds of a clock that only goes on."""
    unanswered: float
    """Requests without an answer."""
    waiting: float
    """Of those, in the queues of the replicas, when each answered last."""
    budget: float | None
    """Mean latents per group of the images since the reading before; None where there were none."""
    latency_ms: float | None
    """Mean of the answers since the reading before."""
    refused: float
    """Requests refused since the reading before."""


@dataclass
class LoadMonitor:
    """The last readings of a service, shared by all visitors, and one burst at a time."""

    client: ServiceClient
    readings: deque[Reading] = field(default_factory=lambda: deque(maxlen=HISTORY))
    _sums: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _bursting: threading.Lock = field(default_factory=threading.Lock)

    def read(self) -> list[Reading]:
        """The readings, with a new one if the last is old enough. Raises ValueError where the service is silent."""
        with self._lock:
            now = time.monotonic()
            if not self.readings or now - self.readings[-1].at >= LEAST_APART:
                self.readings.append(self._reading(now, self.client.ask("/metrics").decode()))
            return list(self.readings)

    def _reading(self, now: float, text: str) -> Reading:
        gauges, sums = defaultdict[str, float](float), defaultdict[str, float](float)
        for family in text_string_to_metric_families(text):
            for name, labels, value, *_ in family.samples:
                if name in ("elit_in_flight", "elit_queue_length"):
                    gauges[name] += value
                elif name == "elit_images_total" and labels["budget"].isdecimal():
                    sums["images"] += value
                    sums["latents"] += value * int(labels["budget"])
                elif name in ("elit_latency_seconds_sum", "elit_latency_seconds_count", "elit_rejections_total"):
                    sums[name] += value
        before, self._sums = self._sums, dict(sums)
        new = {name: max(0.0, value - before.get(name, value)) for name, value in sums.items()}
        images, answers = new.get("images", 0.0), new.get("elit_latency_seconds_count", 0.0)
        return Reading(
            at=now,
            unanswered=gauges["elit_in_flight"],
            waiting=min(gauges["elit_queue_length"], gauges["elit_in_flight"]),
            budget=new["latents"] / images if images else None,
            latency_ms=1e3 * new["elit_latency_seconds_sum"] / answers if answers else None,
            refused=new.get("elit_rejections_total", 0.0),
        )

    def burst(
        self, requests: int, seconds: int, deadline_ms: float, tick: Callable[[int, int], None] | None = None
    ) -> list[Outcome]:
        """Sends so many requests at random within so many seconds, a few before and after, and waits for all.

        Raises ValueError beyond the bounds, and while another burst runs.
        """
        if not (1 <= requests <= MOST_REQUESTS and 1 <= seconds <= MOST_SECONDS and 1 <= deadline_ms <= 60_000):
            raise ValueError(f"a burst has 1 to {MOST_REQUESTS} requests within 1 to {MOST_SECONDS} s")
        if not self._bursting.acquire(blocking=False):
            raise ValueError("a burst is running; wait for its end")
        try:
            about = self.client.describe()["elit"]
            prompts = ["a picture"] if about["text"] else [str(number) for number in range(about["classes"])]
            after = CALM_BEFORE + seconds
            calm = [*range(CALM_BEFORE), *range(after, after + CALM_AFTER)]  # so that the budget is seen to come back
            at = sorted([*calm, *(random.uniform(CALM_BEFORE, after) for _ in range(requests))])
            trace = [Arrival(at=float(each)) for each in at]
            return run_loadtest(
                self.client.url,
                trace,
                prompts=prompts,
                deadline_ms=deadline_ms,
                key=self.client.key,
                progress=tick,
            )
        finally:
            self._bursting.release()


def burst_words(outcomes: list[Outcome]) -> str:
    """What became of a burst, in a sentence."""
    summary = summarize(outcomes)
    served = [each.budget for each in outcomes if each.finish is not None and each.budget is not None]
    latents = f", with {min(served)} to {max(served)} latents" if served else ""
    late = sum(each.finish is not None and not each.met for each in outcomes)
    median = f"; half of them within {summary['p50_ms']:.0f} ms" if summary["p50_ms"] is not None else ""
    refused = sum(each.finish is None for each in outcomes)
    return (
        f"{len(outcomes)} requests: {len(outcomes) - refused} served{latents}{median}; {refused} refused, {late} late."
    )
