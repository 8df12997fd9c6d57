"""HTTP: OpenAI's images API, and beside it health, readiness and metrics. No Ray, no torch.

POST /v1/images/generations    GET /v1/models, /v1/models/NAME    GET /health, /ready    GET /metrics
"""

import asyncio
import hmac
import json
import logging
import math
import time
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect

from elit.files import Json
from elit.serve.metrics import Metrics
from elit.serve.requests import ApiError, Request as ImageRequest, read_request
from elit.serve.settings import ServiceSettings

log = logging.getLogger("elit.serve")
OPEN = ("/health", "/ready")  # Paths without a key.
MAX_BODY, BODY_SECONDS = 65536, 10.0  # Limits of a body: bytes, and seconds to arrive in.
NO_USAGE = dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), 0) | {
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0}
}
router = APIRouter()


def make_app(service: ServiceSettings, backend: Any, *, key: str | None = None) -> FastAPI:
    """The app. Its `state` has `metrics`, and `draining`, which refuses new requests.

    backend: has `describe`, `generate` and `stream` of a `Replica`, all asynchronous. They may raise ApiError.
    """
    app = FastAPI(title="elit serve", docs_url=None, redoc_url=None, openapi_url=None)
    state = app.state
    state.service, state.backend, state.key, state.metrics, state.draining = service, backend, key, Metrics(), False
    app.include_router(router)
    app.add_exception_handler(ApiError, error_response)
    app.add_exception_handler(HTTPException, error_response)
    app.add_middleware(BaseHTTPMiddleware, dispatch=guard)
    return app


async def guard(call: Request, call_next: Any) -> Response:
    """Asks for the key, counts answers, and hides errors from clients."""
    state, key = call.app.state, call.app.state.key
    scheme, _, given = call.headers.get("authorization", "").partition(" ")
    same = key and hmac.compare_digest(given.strip().encode(), key.encode())
    if key and call.url.path not in OPEN and not (same and scheme.lower() == "bearer"):
        error = ApiError(401, "invalid API key; send Authorization: Bearer KEY")
        response: Response = await error_response(call, error)
        response.headers["WWW-Authenticate"] = "Bearer"
    else:
        try:
            response = await call_next(call)
        except Exception:
            log.exception("request failed")
            response = await error_response(call, ApiError(500, "internal error"))
    state.metrics.requests.labels(str(response.status_code)).inc()
    return response


async def error_response(_: Request, error: Exception) -> JSONResponse:
    """The answer for an ApiError, or for a path or method that does not exist."""
    if isinstance(error, HTTPException):
        known = "POST /v1/images/generations, GET /v1/models, /health, /ready and /metrics"
        error = ApiError(error.status_code, f"{error.detail}; there are {known}")
    assert isinstance(error, ApiError)
    headers = {"Retry-After": str(error.retry)} if error.retry else {}
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


@router.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/ready")
async def ready(call: Request) -> dict[str, str]:
    check_draining(call)
    await call.app.state.backend.describe()
    return {"status": "ready"}


@router.get("/metrics")
async def metrics(call: Request) -> Response:
    return Response(call.app.state.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models")
async def models(call: Request) -> Json:
    return {"object": "list", "data": [await model(call, call.app.state.service.name)]}


@router.get("/v1/models/{name:path}")
async def model(call: Request, name: str) -> Json:
    service = call.app.state.service
    if name != service.name:
        raise ApiError(404, f"model: {name[:64]!r} is not served here; give {service.name!r}", param="model")
    info = await call.app.state.backend.describe()
    return {"id": name, "object": "model", "created": 0, "owned_by": "elit", "elit": info}


@router.post("/v1/images/generations")
async def generate(call: Request) -> Response:
    state, arrival = call.app.state, time.time()
    body = await read_body(call)
    check_draining(call)
    request = read_request(body, state.service, await state.backend.describe(), arrival)
    if request.stream:
        return StreamingResponse(events(state, request), media_type="text/event-stream")
    with state.metrics.request():
        answer = await state.backend.generate(request)
        report = count_served(state.metrics, answer, request)
    name = request.response_format
    start = f"data:image/{request.output_format};base64," if name == "url" else ""
    content = {"created": int(time.time()), "model": state.service.name, "output_format": request.output_format}
    content |= {"size": "{}x{}".format(*answer["size"]), "elit": report}
    content["data"] = [{name: start + b64encode(image).decode()} for image in answer["images"]]
    return JSONResponse(content)


async def events(state: Any, request: ImageRequest) -> AsyncIterator[str]:
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
                        content = {"b64_json": b64encode(image).decode(), "elit": report}
                        yield event("image_generation.completed", content | {"usage": NO_USAGE}, answer)
    except ApiError as error:
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
    return {name: answer[name] for name in names} | {"seeds": list(request.seeds), "deadline_met": met}
