"""Metrics for Prometheus, counted at the gateway from the answers of the replicas."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from elit.files import Json
from elit.serve.requests import ApiError

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One registry, so that several services of a process do not meet."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter: Any = partial(Counter, registry=self.registry)
        gauge: Any = partial(Gauge, registry=self.registry)
        histogram: Any = partial(Histogram, registry=self.registry)
        self.requests = counter("elit_requests", "Answers by HTTP status", ["status"])
        self.rejections = counter("elit_rejections", "Refused requests by reason", ["reason"])
        self.images = counter("elit_images", "Images served by latents per window and steps", ["budget", "steps"])
        self.latency = histogram("elit_latency_seconds", "From arrival to answer, of the served", buckets=SECONDS)
        self.wait = histogram("elit_queue_wait_seconds", "Before the first step", buckets=SECONDS)
        sizes = (1, 2, 4, 8, 16, 32, 64)
        self.batch = histogram("elit_batch_images", "Images in progress, mean over a request's steps", buckets=sizes)
        self.deadlines = counter("elit_deadlines", "Requests by whether their deadline was met", ["met"])
        self.queue = gauge("elit_queue_length", "Requests waiting at a replica at its last answer", ["replica"])
        self.in_flight = gauge("elit_in_flight", "Requests without an answer")
        self.retries = counter("elit_retries", "Requests sent again since a replica died")

    @contextmanager
    def request(self) -> Iterator[None]:
        """Counts a request without an answer, and a failure that ends it."""
        with self.in_flight.track_inprogress():
            try:
                yield
            except ApiError as error:
                if error.status == 429 or error.status >= 500:
                    self.rejections.labels(error.code or "unavailable").inc()
                    self.deadlines.labels("no").inc()
                raise

    def served(self, answer: Json, seconds: float, met: bool) -> None:
        self.images.labels(str(answer["budget"]), str(answer["steps"])).inc(len(answer["images"]))
        self.latency.observe(seconds)
        self.wait.observe(answer["queue_ms"] / 1e3)
        self.batch.observe(answer["batch"])
        self.queue.labels(answer["replica"]).set(answer["queue_length"])
        self.deadlines.labels("yes" if met else "no").inc()

    def unanswered(self) -> int:
        return int(self.registry.get_sample_value("elit_in_flight") or 0)

    def text(self) -> bytes:
        for sample in () if self.unanswered() else next(iter(self.queue.collect())).samples:
            self.queue.labels(**sample.labels).set(0)  # nothing waits anywhere
        return generate_latest(self.registry)
