"""HTTP: OpenAI's images API, and beside it health, readiness and metrics. No Ray, no torch.

POST /v1/images/generations    GET /v1/models, /v1/models/NAME    GET /health, /ready    GET /metrics
"""

import asyncio
import base64
import hmac
import json
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from elit.files import Json
from elit.serve.metrics import Metrics
from elit.serve.requests import ApiError, ImageRequest, Job, make_job, read_request
from elit.serve.settings import ServiceSettings

log = logging.getLogger("elit.serve")
OPEN = ("/health", "/ready")
"""Paths without a key."""
MAX_BODY = 65536
"""Bytes."""
BODY_SECONDS = 10.0
"""Time for a request's body to arrive."""
NO_USAGE = dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), 0) | {
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0}
}


class Backend(Protocol):
    """The replicas, which jobs go to."""

    async def describe(self) -> Json:
        """`replica.describe` of the model. Raises ApiError where there is none yet."""
        ...

    async def generate(self, job: Job) -> Json:
        """A replica's answer: images and their settings, or a refusal. Raises ApiError."""
        ...

    def stream(self, job: Job) -> AsyncGenerator[Json, None]:
        """Previews ({"preview": bytes}), then the answer. Raises ApiError."""
        ...


def make_app(service: ServiceSettings, backend: Backend, *, key: str | None = None) -> FastAPI:
    """The app. Its `state` has `metrics`, and `draining`, which refuses new requests."""
    app = FastAPI(title="elit serve", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.metrics, app.state.draining = Metrics(), False
    metrics: Metrics = app.state.metrics

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        return as_response(error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        known = "POST /v1/images/generations, GET /v1/models, /health, /ready and /metrics"
        message = {404: "no such path", 405: "method not allowed"}.get(error.status_code)
        return as_response(ApiError(error.status_code, f"{message}; there are {known}" if message else error.detail))

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        if key and request.url.path not in OPEN and not has_key(request, key):
            response: Response = as_response(ApiError(401, "invalid API key; send Authorization: Bearer KEY"))
        else:
            try:
                response = await call_next(request)
            except Exception:  # a client sees no trace
                log.exception("request failed")
                response = as_response(ApiError(500, "internal error"))
        metrics.requests.labels(str(response.status_code)).inc()
        return response

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        if app.state.draining:
            raise ApiError(503, "the service is stopping", retry=1)
        await backend.describe()
        return {"status": "ready"}

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type=metrics.content_type)

    @app.get("/v1/models")
    async def models() -> Json:
        return {"object": "list", "data": [await model_info()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Json:
        if name != service.name:
            raise ApiError(404, f"model: {name[:64]!r} is not served here; give {service.name!r}", param="model")
        return await model_info()

    async def model_info() -> Json:
        info = await backend.describe()
        return {"id": service.name, "object": "model", "created": 0, "owned_by": "elit", "elit": info}

    @app.post("/v1/images/generations")
    async def generate(request: Request) -> Response:
        arrival = time.time()
        wanted = read_request(await read_body(request))
        if app.state.draining:
            raise ApiError(503, "the service is stopping; try another", retry=1)
        job = make_job(wanted, service, await backend.describe(), arrival)
        if wanted.stream:
            return StreamingResponse(events(wanted, job), media_type="text/event-stream")
        with metrics.request():
            answer = await backend.generate(job)
            check_served(answer)
            metrics.served(answer, time.time() - job.arrival, time.time() <= job.deadline)
        return JSONResponse(as_images(answer, wanted, job, service))

    async def events(wanted: ImageRequest, job: Job) -> AsyncIterator[str]:
        number = 0
        try:
            with metrics.request():
                async with aclosing(backend.stream(job)) as answers:
                    async for answer in answers:
                        if "preview" in answer:
                            event = {"partial_image_index": number, "b64_json": base64_of(answer["preview"])}
                            yield as_event("image_generation.partial_image", event | common(wanted, job, answer))
                            number += 1
                            continue
                        check_served(answer)
                        metrics.served(answer, time.time() - job.arrival, time.time() <= job.deadline)
                        for image in answer["images"]:
                            event = {"b64_json": base64_of(image), "usage": NO_USAGE, "elit": report(answer, job)}
                            yield as_event("image_generation.completed", event | common(wanted, job, answer))
        except ApiError as error:
            yield as_event("error", error.body())

    return app


def as_response(error: ApiError) -> JSONResponse:
    headers = {"Retry-After": str(error.retry)} if error.retry else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


def has_key(request: Request, key: str) -> bool:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    same = hmac.compare_digest(given.strip().encode(), key.encode())
    return same and scheme.lower() == "bearer"


async def read_body(request: Request) -> bytes:
    """The body, of at most `MAX_BODY` bytes within `BODY_SECONDS`. Raises ApiError."""
    too_large = ApiError(413, f"body must have at most {MAX_BODY} bytes")
    length = request.headers.get("content-length", "")
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            if length.isdigit() and int(length[:20]) > MAX_BODY:
                raise too_large
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"body must arrive within {BODY_SECONDS:g} s") from None
    except ClientDisconnect:
        raise ApiError(400, "body: the connection was closed") from None
    return body


def check_served(answer: Json) -> None:
    """Raises ApiError for a refusal, and for what the model does not take."""
    if reason := answer.get("refused"):
        seconds = max(1, math.ceil(answer["retry_after"]))
        late = "the deadline cannot be met at the least quality that the request accepts"
        why = late if reason == "deadline" else "the queue is full"
        raise ApiError(429, f"{why}; try again in {seconds} s", code=reason, retry=seconds)
    if "invalid" in answer:
        raise ApiError(400, answer["invalid"])


def as_images(answer: Json, wanted: ImageRequest, job: Job, service: ServiceSettings) -> Json:
    """OpenAI's ImagesResponse, with the settings of the images under "elit"."""
    as_url = wanted.response_format == "url"
    start = f"data:image/{job.output_format};base64," if as_url else ""
    width, height = answer["size"]
    return {
        "created": int(time.time()),
        "data": [{"url" if as_url else "b64_json": start + base64_of(image)} for image in answer["images"]],
        "output_format": job.output_format,
        "size": f"{width}x{height}",
        "model": service.name,
        "elit": report(answer, job),
    }


def report(answer: Json, job: Job) -> Json:
    """How images were made."""
    names = ("budget", "steps", "guidance", "gflops", "queue_ms", "compute_ms", "batch", "replica")
    more = {"seeds": list(job.seeds), "deadline_met": time.time() <= job.deadline}
    return {name: answer[name] for name in names} | more


def common(wanted: ImageRequest, job: Job, answer: Json) -> Json:
    """The fields of all events of a stream."""
    size, quality = "{}x{}".format(*answer["size"]), wanted.quality or "auto"
    more = {"output_format": job.output_format, "size": size, "quality": quality, "background": "opaque"}
    return {"created_at": int(time.time())} | more


def as_event(kind: str, content: Json) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | content)}\n\n"


def base64_of(content: bytes) -> str:
    return base64.b64encode(content).decode()
