"""A client's JSON as a job for a replica: read, limited, checked. Nothing in it is opened or run."""

import difflib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError

from elit.budgets import resolve_budget
from elit.config import require
from elit.files import Json
from elit.models.labels import class_numbers
from elit.sampling.settings import Sampling
from elit.serve.ladder import make_guidance, qualities
from elit.serve.settings import ServiceSettings, parse_size

Number = StrictInt | StrictFloat
MAX_PROMPT = 1000
"""Characters."""


class ApiError(Exception):
    """An answer in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry: int = 0):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry = status, message, param, code, retry

    def body(self) -> Json:
        """The content of the answer."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class ImageRequest(BaseModel):
    """The body of POST /v1/images/generations: OpenAI's fields, then ours."""

    model_config = ConfigDict(extra="forbid")

    prompt: StrictStr | StrictInt
    model: StrictStr | None = None
    n: StrictInt | None = Field(None, ge=1)
    size: StrictStr | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    quality: Literal["low", "medium", "high", "auto"] | None = None
    user: StrictStr | None = Field(None, max_length=256)
    stream: StrictBool | None = None
    partial_images: StrictInt | None = Field(None, ge=0, le=3)
    # Without a meaning for these models.
    background: object = None
    moderation: object = None
    style: object = None
    output_compression: object = None
    safety_identifier: object = None

    budget: StrictStr | StrictInt | StrictFloat | None = None
    deadline_ms: Number | None = Field(None, gt=0, le=3_600_000, allow_inf_nan=False)
    seed: StrictInt | None = Field(None, ge=0, lt=2**63)
    num_inference_steps: StrictInt | None = Field(None, ge=1)
    guidance_scale: Number | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    guidance_budget: StrictStr | StrictInt | StrictFloat | None = None
    negative_prompt: StrictStr | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request for the policy of a replica. Times are seconds on any one clock."""

    id: str
    arrival: float
    deadline: float
    settings: tuple[Sampling, ...]
    """The settings it accepts, from the least to the preferred."""
    first: int = 0
    """Rung of the ladder that settings[0] is."""
    images: int = 1

    @property
    def least(self) -> Sampling:
        return self.settings[0]

    def at(self, level: int) -> Sampling:
        """The rung `level`, or the nearest that it accepts."""
        return self.settings[min(max(level - self.first, 0), len(self.settings) - 1)]


@dataclass(frozen=True, kw_only=True)
class Job(Request):
    """A checked request for a replica, with times of the wall clock."""

    prompt: str
    seeds: tuple[int, ...]
    """One an image."""
    size: tuple[int, int] | None = None
    """(width, height); None = the model's own."""
    negative_prompt: str = ""
    output_format: str = "png"
    previews: int = 0


def read_request(body: bytes) -> ImageRequest:
    """The request in a body. Raises ApiError naming the first invalid field."""
    try:
        return ImageRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = str(first["loc"][0])[:64] if first["loc"] else "body"
        message = first["msg"][:200]
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, ImageRequest.model_fields, n=1)
            message = "no such parameter" + (f"; did you mean {near[0]!r}?" if near else "")
        raise ApiError(400, f"{name}: {message}", param=name) from None


def make_job(request: ImageRequest, service: ServiceSettings, model: Json, now: float) -> Job:
    """The job of a request that arrives at `now`. model: its description (`replica.describe`).

    Raises ApiError beyond the service's limits, and for what the model does not support.
    """
    if request.model not in (None, "", service.name):
        message = f"model: {request.model[:64]!r} is not served here; give {service.name!r}" if request.model else ""
        raise ApiError(404, message, param="model", code="model_not_found")
    try:
        return _make_job(request, service, model, now)
    except (ValueError, OverflowError) as error:
        message = " ".join(str(error).split())[:300]
        raise ApiError(400, message, param=re.split(r"\W", message)[0]) from None


def _make_job(request: ImageRequest, service: ServiceSettings, model: Json, now: float) -> Job:
    """Messages of its errors begin with the parameter's name."""
    count = request.n or 1
    require(count <= service.most_images, "n", count, f"at most {service.most_images}")
    if request.guidance_scale not in (None, 1) and not model["guides"]:
        raise ValueError("guidance_scale: not supported by this model")
    seed = secrets.randbelow(2**31) if request.seed is None else request.seed
    require(seed + count <= 2**63, "seed", seed, "less than 2**63 - n")
    settings, first = _accepted(request, service, model)
    negative = request.negative_prompt or ""
    require(len(negative) <= MAX_PROMPT, "negative_prompt", negative[:32], f"at most {MAX_PROMPT} characters")
    if negative and not model["negative_prompt"]:
        raise ValueError("negative_prompt: not supported by this model")
    if negative and (settings[0].guidance is None or settings[0].guidance.scale < 1):
        raise ValueError("negative_prompt: goes with a guidance_scale above 1")
    return Job(
        id=secrets.token_hex(8),
        prompt=_prompt(request.prompt, model),
        arrival=now,
        deadline=now + (request.deadline_ms or service.deadline_ms) / 1e3,
        settings=settings,
        first=first,
        images=count,
        seeds=tuple(range(seed, seed + count)),
        size=_size(request.size, model),
        negative_prompt=negative,
        output_format=request.output_format or "png",
        previews=(request.partial_images or 0) if request.stream else 0,
    )


def _accepted(request: ImageRequest, service: ServiceSettings, model: Json) -> tuple[tuple[Sampling, ...], int]:
    """The part of the service's ladder that a request accepts, and where that begins."""
    default, budgets, steps = model["guidance_scale"], model["budgets"], request.num_inference_steps
    scale = service.scale(default) if request.guidance_scale is None else float(request.guidance_scale)
    if request.guidance_budget is not None and scale == 1:
        raise ValueError("guidance_budget: goes with a guidance_scale other than 1")
    ladder = service.ladder(budgets, default)
    accepted, first = qualities(ladder)[request.quality or "auto"]
    if request.budget is not None:
        if request.quality not in (None, "auto"):
            raise ValueError(f"budget, quality={request.quality!r}: give one of them")
        accepted, first = (replace(ladder[-1], budget=_resolved("budget", request.budget, budgets)),), 0
    if steps is not None:  # rungs with fewer steps stand for their budget
        require(steps <= service.most_steps, "num_inference_steps", steps, f"at most {service.most_steps}")
        places: dict[Any, int] = {rung.budget: place for place, rung in enumerate(accepted)}
        first += min(places.values())
        rising = sorted(places, key=lambda count: count or 0)
        accepted = tuple(replace(ladder[-1], steps=steps, budget=count) for count in rising)
    weak = request.guidance_budget if request.guidance_budget is not None else service.guidance_budget or None
    weak = _resolved("guidance_budget", weak, budgets) if weak is not None and scale != 1 else None
    guidance = make_guidance(scale, weak, budgets)
    return tuple(replace(rung, guidance=guidance) for rung in accepted), first


def _resolved(name: str, value: int | float | str, budgets: Sequence[int]) -> int | None:
    try:
        return resolve_budget(value[:64] if isinstance(value, str) else value, budgets)
    except ValueError as error:
        raise ValueError(re.sub("^budget", name, str(error))) from None


def _prompt(prompt: str | int, model: Json) -> str:
    text = str(prompt).strip()[: MAX_PROMPT + 1]
    require(1 <= len(text) <= MAX_PROMPT, "prompt", text[:32], f"1 to {MAX_PROMPT} characters")
    if model["text"]:
        return text
    try:
        (number,) = class_numbers([text], model["class_names"], model["classes"])
    except ValueError as error:
        raise ValueError(re.sub("^labels?", "prompt", str(error))) from None
    require(0 <= number < model["classes"], "prompt", text[:64], f"a class, 0 to {model['classes'] - 1}")
    return str(number)


def _size(size: str | None, model: Json) -> tuple[int, int] | None:
    """(width, height), or None for the model's own."""
    own, multiple = tuple(model["size"]), model["multiple"]
    if size in (None, "auto", f"{own[0]}x{own[1]}"):
        return None
    require(bool(multiple), "size", str(size)[:32], f"{own[0]}x{own[1]}, the size of this model, or auto")
    width, height = parse_size(str(size))
    valid = not width % multiple and not height % multiple and width * height <= own[0] * own[1]
    require(valid, "size", size, f"multiples of {multiple}, at most {own[0] * own[1]} pixels ({own[0]}x{own[1]})")
    return width, height
