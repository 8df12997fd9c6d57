"""HTTP: OpenAI's images API, and beside it health, readiness and metrics. No Ray, no torch."""

import asyncio
import hmac
import json
import logging
import math
import re
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect

from elit.files import Json
from elit.pretrained import model_folder
from elit.serve.metrics import Metrics
from elit.serve.requests import ApiError, Parameters, Request as ImageRequest, read_request
from elit.serve.settings import ServiceSettings

log = logging.getLogger("elit.serve")
OPEN = ("/health", "/ready")  # Paths without a key.
HERE = re.compile(r"(https?://)?(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.IGNORECASE)  # This machine in a header.
PROBE = 1.0  # Seconds in which a replica must answer that it is there.
STATUSES = (400, 401, 403, 404, 405, 408, 413, 429, 500, 503)
BODY = {"required": True, "content": {"application/json": {"schema": Parameters.model_json_schema()}}}
MAX_BODY, BODY_SECONDS = 65536, 10.0  # Limits of a body: bytes, and seconds to arrive in.
NO_USAGE = dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), 0) | {
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0}
}
router = APIRouter()


def make_app(service: ServiceSettings, backend: Any, *, key: str | None = None) -> FastAPI:
    """The app. Its `state` has `metrics`, and `draining`, which refuses new requests."""
    app = FastAPI(title="elit serve", docs_url=None, redoc_url=None)
    state = app.state
    state.service, state.backend, state.key, state.metrics, state.draining = service, backend, key, Metrics(), False
    app.include_router(router, responses={each: {"description": HTTPStatus(each).phrase} for each in STATUSES})
    app.add_exception_handler(ApiError, error_response)
    app.add_exception_handler(HTTPException, error_response)
    app.add_middleware(BaseHTTPMiddleware, dispatch=guard)
    return app


async def guard(call: Request, call_next: Any) -> Response:
    """Checks who asks, counts answers, and hides errors from clients."""
    requests, method = call.app.state.metrics.requests, call.method
    call.scope["method"] = "GET" if method == "HEAD" else method
    try:
        if call.scope["path"] not in OPEN:
            check_access(call)
        response: Response = await call_next(call)
    except asyncio.CancelledError:  # Serve's way to say that the client has left
        requests.labels("499").inc()
        raise
    except Exception as error:
        if not isinstance(error, ApiError):
            log.exception("request failed")
            error = ApiError(500, "internal error")
        response = await error_response(call, error)
    finally:
        call.scope["method"] = method  # by which the server leaves out the body of HEAD
    requests.labels(str(response.status_code)).inc()
    return response


def check_access(call: Request) -> None:
    """Raises ApiError without the key; where there is none, for pages of other sites that a browser here has open."""
    if key := call.app.state.key:
        scheme, _, given = call.headers.get("authorization", "").partition(" ")
        if not hmac.compare_digest(given.strip().encode(), key.encode()) or scheme.lower() != "bearer":
            raise ApiError(401, "invalid API key; send Authorization: Bearer KEY", code="invalid_api_key")
    elif not all(map(HERE.fullmatch, [call.headers.get("host", ""), *call.headers.getlist("origin")])):
        raise ApiError(403, "host and origin must be this machine's for a service without a key")


async def error_response(_: Request, error: Exception) -> JSONResponse:
    """The answer for an ApiError, or for a path or method that does not exist."""
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException):
        headers |= error.headers or {}
        known = "POST /v1/images/generations, GET /v1/models, /health, /ready, /metrics and /openapi.json"
        error = ApiError(error.status_code, f"{error.detail}; there are {known}")
    assert isinstance(error, ApiError)
    headers |= {"Retry-After": str(error.retry)} if error.retry else {}
    headers |= {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


@router.get("/health")
async def health(call: Request) -> dict[str, str]:
    try:
        async with asyncio.timeout(PROBE):
            await call.app.state.backend.alive()
    except (TimeoutError, RuntimeError):
        raise ApiError(503, "no replica answers", code="unavailable", retry=1) from None
    return {"status": "ok"}


@router.get("/ready")
async def ready(call: Request) -> dict[str, str]:
    check_draining(call)
    return await health(call)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(call: Request) -> Response:
    return Response(call.app.state.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models")
async def models(call: Request) -> Json:
    return {"object": "list", "data": [await model(call, call.app.state.service.name)]}


@router.get("/v1/model_info")
async def model_info(call: Request) -> Json:
    """As SGLang's client asks for it."""
    return {"model_path": str(model_folder(call.app.state.service.model)), "task_type": "T2I"}


@router.get("/v1/models/{name:path}")
async def model(call: Request, name: str) -> Json:
    service = call.app.state.service
    if name != service.name:
        raise ApiError(404, f"model: {name[:64]!r} is not served here; give {service.name!r}", param="model")
    info = await call.app.state.backend.describe()
    return {"id": name, "object": "model", "created": 0, "owned_by": "elit", "elit": info}


@router.post("/v1/images/generations", openapi_extra={"requestBody": BODY})
async def generate(call: Request) -> Response:
    state, arrival = call.app.state, time.time()
    body = await read_body(call)
    check_draining(call)
    request = read_request(body, state.service, await state.backend.describe(), arrival)
    if request.stream:
        rest = events(state, request)
        first = await while_there(call, anext(rest))  # a refusal has its own status
        return StreamingResponse(prepended(first, rest), media_type="text/event-stream")
    with state.metrics.request():
        answer = await while_there(call, state.backend.generate(request))
        report = count_served(state.metrics, answer, request)
    name = request.response_format
    start = f"data:image/{request.output_format};base64," if name == "url" else ""
    content = {"created": int(time.time()), "model": state.service.name, "output_format": request.output_format}
    content |= {"size": "{}x{}".format(*answer["size"]), "elit": report}
    content |= {"background": "opaque", "usage": NO_USAGE} | stage_metrics(answer, request)
    content["data"] = [{name: start + b64encode(image).decode()} for image in answer["images"]]
    return JSONResponse(content)


@router.post("/v1/images/{kind}")
async def other(kind: str) -> Json:
    raise ApiError(404, f"images/{kind[:32]}: this model makes images of prompts alone; POST /v1/images/generations")


async def while_there(call: Request, answer: Awaitable[Any]) -> Any:
    """The answer, given up where the client leaves."""

    async def leaving() -> None:
        while (await call.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(each) for each in (answer, leaving())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done() or tasks[0].cancelled():  # by Serve
            raise ApiError(499, "the client has left", code="client_closed")
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


async def prepended(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for each in rest:
        yield each


async def events(state: Any, request: ImageRequest) -> AsyncIterator[str]:
    """Raises ApiError before the first event; later errors are events."""
    number = 0

    def event(kind: str, content: Json, answer: Json) -> str:
        common = {"type": kind, "created_at": int(time.time()), "size": "{}x{}".format(*answer["size"])}
        common |= {"output_format": request.output_format, "quality": request.quality, "background": "opaque"}
        return f"event: {kind}\ndata: {json.dumps(common | content)}\n\n"

    try:
        with state.metrics.request():
            async with aclosing(state.backend.stream(request)) as answers:
                async for answer in answers:
                    if "preview" in answer:
                        content = {"partial_image_index": number, "b64_json": b64encode(answer["preview"]).decode()}
                        yield event("image_generation.partial_image", content, answer)
                        number += 1
                        continue
                    report = count_served(state.metrics, answer, request)
                    for image in answer["images"]:
                        content = {"b64_json": b64encode(image).decode(), "elit": report, "usage": NO_USAGE}
                        yield event("image_generation.completed", content | stage_metrics(answer, request), answer)
    except ApiError as error:
        if number == 0:
            raise
        yield f"event: error\ndata: {json.dumps({'type': 'error'} | error.body())}\n\n"


def check_draining(call: Request) -> None:
    if call.app.state.draining:
        raise ApiError(503, "the service is stopping; try another", retry=1)


async def read_body(call: Request) -> bytes:
    """The body, of at most `MAX_BODY` bytes within `BODY_SECONDS`. Raises ApiError."""
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in call.stream():
                body += part
                if len(body) > MAX_BODY:
                    raise ApiError(413, f"body must have at most {MAX_BODY} bytes")
    except TimeoutError:
        raise ApiError(408, f"body must arrive within {BODY_SECONDS:g} s") from None
    except ClientDisconnect:
        raise ApiError(400, "body: the connection was closed") from None
    return body


def count_served(metrics: Metrics, answer: Json, request: ImageRequest) -> Json:
    """Counts an answer with images; returns how they were made. Raises ApiError for a refusal or an invalid request."""
    if reason := answer.get("refused"):
        seconds = max(1, math.ceil(answer["retry_after"]))
        late = "the deadline cannot be met at the least quality that the request accepts"
        why = {"deadline": late, "queue": "the queue is full"}[reason]
        raise ApiError(429, f"{why}; try again in {seconds} s", code=reason, retry=seconds)
    if "invalid" in answer:
        raise ApiError(400, answer["invalid"])
    met = time.time() <= request.deadline
    metrics.served(answer, time.time() - request.arrival, met)
    names = ("budget", "steps", "guidance", "gflops", "queue_ms", "compute_ms", "batch", "replica")
    note = {"ignored": list(request.ignored)} if request.ignored else {}
    return {name: answer[name] for name in names} | {"seeds": list(request.seeds), "deadline_met": met} | note


def stage_metrics(answer: Json, request: ImageRequest) -> Json:
    """Milliseconds of the stages, as vLLM-Omni's clients ask for them."""
    return {"metrics": {"stage_durations": answer["stages"]}} if request.stage_metrics else {}
