"""Ray Serve: client -> proxy -> `Gateway` (HTTP by api.py) -> the shorter queue of two `Engines` -> policy, engine."""

import asyncio
import logging
import os
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partialmethod
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from elit.files import Json
from elit.serve.api import make_app
from elit.serve.requests import ApiError, Request
from elit.serve.settings import CLUSTER_VARIABLE, KEY_VARIABLE, ServiceSettings

log = logging.getLogger("elit.serve")
TRIES = 4
GRACE = 5.0  # Seconds after a deadline in which an answer may still come.


def listen_on_loopback() -> None:
    """Binds this process's gRPC servers to loopback where Ray is on this machine alone."""
    import grpc.aio

    if os.environ.get(CLUSTER_VARIABLE) != "0":
        return

    for kind in grpc.aio.Server.__subclasses__():
        for name in ("add_insecure_port", "add_secure_port"):
            setattr(kind, name, partialmethod(add_on_loopback, getattr(kind, name)))


def add_on_loopback(server: Any, add: Any, address: str, *rest: Any) -> int:
    return add(server, re.sub(r"^(\[::\]|0\.0\.0\.0):", "127.0.0.1:", address), *rest)


class Engines:
    """A replica with the model."""

    def __init__(self, service: ServiceSettings):
        from elit.serve.deployment import listen_on_loopback  # the module's own, not a pickled copy
        from elit.serve.replica import load_replica

        listen_on_loopback()
        self.replica = load_replica(service, serve.get_replica_context().replica_id.unique_id)

    async def describe(self) -> Json:
        return await self.replica.describe() | {"process": os.getpid()}

    async def generate(self, request: Request) -> Json:
        return await self.replica.generate(request)

    async def stream(self, request: Request) -> AsyncGenerator[Json, None]:
        async for answer in self.replica.stream(request):
            yield answer

    async def check_health(self) -> None:
        await self.replica.alive()


class Gateway:
    """HTTP in, requests to replicas; `serve.ingress` gives it its app, whose backend it is."""

    def __init__(self, engines: DeploymentHandle, service: ServiceSettings):
        from elit.serve import deployment

        deployment.listen_on_loopback()
        deployment.gateways.append(self)
        key = os.environ.get(KEY_VARIABLE) or None
        if service.needs_key and not key:
            raise RuntimeError(f"the environment variable {KEY_VARIABLE} is empty; this service needs a key")
        self.engines = engines
        self.model: Json | None = None
        self.http_app: Any = make_app(service, self, key=key)

    async def describe(self) -> Json:
        if self.model is None:
            async with errors_for_clients(10.0):
                self.model = await self.engines.describe.remote()
        return self.model

    async def alive(self) -> None:
        """Asks a replica; raises RuntimeError where it fails, and waits where there is none."""
        try:
            await self.engines.check_health.remote()
        except (RayError, RayServeException) as error:
            raise RuntimeError("a replica fails") from error

    async def generate(self, request: Request) -> Json:
        for _ in range(TRIES):
            with self.retrying(request):
                async with errors_for_clients(max(request.deadline - time.time(), 0) + GRACE):
                    return await self.engines.generate.remote(request)
        raise unavailable("the replicas that had this request died")

    async def stream(self, request: Request) -> AsyncGenerator[Json, None]:
        for _ in range(TRIES):
            with self.retrying(request):
                async with errors_for_clients():
                    answers: Any = self.engines.options(stream=True).stream.remote(request)
                    async for answer in answers:
                        yield answer
                    return
        raise unavailable("the replicas that had this request died")

    @contextmanager
    def retrying(self, request: Request) -> Iterator[None]:
        """Goes on where the replica of a request died, unless its deadline has passed."""
        try:
            yield
        except RayActorError:
            self.http_app.state.metrics.retries.inc()
            self.http_app.state.metrics.queue.clear()  # of the dead one; the others report with their next answers
            if time.time() >= request.deadline:
                raise unavailable("a replica died, and the deadline has passed") from None
            log.warning("replica died; request %s is sent again", request.id)

    async def drain(self, seconds: float) -> int:
        """Refuses new requests, and waits for unanswered ones; returns how many are left after `seconds`."""
        self.http_app.state.draining = True
        metrics, end = self.http_app.state.metrics, time.monotonic() + seconds
        while metrics.unanswered() and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return metrics.unanswered()


@asynccontextmanager
async def errors_for_clients(seconds: float | None = None) -> AsyncIterator[None]:
    """Turns Ray's errors, and a timeout, into ApiError; but RayActorError where the replica died."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except RayActorError:
        raise
    except TimeoutError:
        raise unavailable("no replica answered in time") from None
    except BackPressureError:
        raise unavailable("the queue is full") from None
    except TaskCancelledError:
        raise asyncio.CancelledError from None
    except (RayError, RayServeException) as error:
        if isinstance(cause := getattr(error, "cause", None), RayActorError):
            raise cause from None
        log.exception("a replica failed")
        raise unavailable("the replica failed") from None


def unavailable(why: str) -> ApiError:
    return ApiError(503, f"{why}; try again", code="unavailable", retry=1)


gateways: list[Gateway] = []  # The gateway of this process: Serve builds the app apart from the object it belongs to.


def build_app() -> Any:
    """The app of this process's gateway; Serve calls it after the gateway's constructor."""
    from elit.serve import deployment  # the module's own state, not that of a pickled copy

    return deployment.gateways[-1].http_app


def application(options: Json) -> Any:
    """Serve's application, as a config's import_path names it. options: `ServiceSettings` by name."""
    service = ServiceSettings(**options)
    scale: Json = {"num_replicas": service.replicas}
    if high := service.max_replicas:
        low = max(1, service.min_replicas)
        scale = {"autoscaling_config": {"min_replicas": low, "max_replicas": high, "target_ongoing_requests": 4}}
    engines: Any = serve.deployment(
        Engines,
        name="Engines",
        ray_actor_options={"num_cpus": service.cpus, "num_gpus": service.gpus or 0.0},
        max_ongoing_requests=service.max_queue + 64,  # more than a replica's policy holds; it refuses the rest
        max_queued_requests=service.max_queue,
        graceful_shutdown_timeout_s=service.drain_seconds,
        health_check_period_s=2.0,
        health_check_timeout_s=20.0,
        **scale,
    )
    gateway: Any = serve.deployment(
        serve.ingress(build_app)(Gateway),
        name="Gateway",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=10_000,
        graceful_shutdown_timeout_s=GRACE,
    )
    return gateway.bind(engines.bind(service), service)
