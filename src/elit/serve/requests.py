"""A client's JSON as a job for a replica: read, limited, checked. Nothing in it is ever opened or run."""

import difflib
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError

from elit.arguments import class_numbers
from elit.budgets import resolve_budget
from elit.serve.costs import Setting
from elit.serve.settings import ServiceSettings, guided, parse_size

# Of OpenAI's API, what says nothing to a model like this; taken and left alone.
IGNORED = ("background", "moderation", "style", "output_compression", "safety_identifier")
Number = StrictInt | StrictFloat


class ApiError(Exception):
    """An answer in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry: int = 0):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry = status, message, param, code, retry

    def body(self) -> dict[str, Any]:
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

    budget: StrictStr | StrictInt | StrictFloat | None = None
    deadline_ms: Number | None = Field(None, gt=0, le=3_600_000, allow_inf_nan=False)
    seed: StrictInt | None = Field(None, ge=0, lt=2**63)
    num_inference_steps: StrictInt | None = Field(None, ge=1)
    guidance_scale: Number | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    guidance_budget: StrictStr | StrictInt | StrictFloat | None = None
    negative_prompt: StrictStr | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a replica is asked for."""

    id: str
    prompt: str
    arrival: float
    """Seconds of the wall clock, as the deadline."""
    deadline: float
    settings: tuple[Setting, ...]
    first: int
    seeds: tuple[int, ...]
    guidance_scale: float
    size: tuple[int, int] | None = None
    """(width, height); None = the model's own."""
    negative_prompt: str = ""
    output_format: str = "png"
    previews: int = 0


def read_json(body: bytes) -> dict[str, Any]:
    """The object in a body. Raises ApiError."""
    try:
        content = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError):  # not UTF-8, not JSON, NaN, thousands of digits or of brackets
        raise ApiError(400, "body: not valid JSON in UTF-8") from None
    if not isinstance(content, dict):
        raise ApiError(400, f"body: a JSON {type(content).__name__}; give an object, such as {{'prompt': '3'}}")
    return content


def read_request(content: dict[str, Any]) -> ImageRequest:
    """Raises ApiError naming the first field that does not fit."""
    wanted = {name: value for name, value in content.items() if name not in IGNORED}
    try:
        return ImageRequest.model_validate(wanted)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = str(first["loc"][0])[:64] if first["loc"] else "body"
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, ImageRequest.model_fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ApiError(400, f"{name}: no such parameter{hint}", param=name) from None
        raise ApiError(400, f"{name}: {first['msg'][:200]}", param=name) from None


def qualities(ladder: Sequence[Setting]) -> dict[str, tuple[tuple[Setting, ...], int]]:
    """The rungs of a ladder that low, medium, high and auto accept, and the place of their first.

    auto: all of them. high: the full setting alone. medium: from the middle up. low: up to the middle.
    """
    middle = len(ladder) // 2
    return {
        "auto": (tuple(ladder), 0),
        "low": (tuple(ladder[: middle + 1]), 0),
        "medium": (tuple(ladder[middle:]), middle),
        "high": (tuple(ladder[-1:]), len(ladder) - 1),
    }


def make_job(request: ImageRequest, service: ServiceSettings, about: dict[str, Any], now: float) -> Job:
    """The job of a request, whose clock is at `now`. about: `Engine.describe()`. Raises ApiError for what is beyond
    the service's limits or not the model's.
    """
    if request.model not in (None, "", service.name):
        message = f"model: {request.model[:64]!r} is not served here; give {service.name!r}" if request.model else ""
        raise ApiError(404, message, param="model", code="model_not_found")
    count = request.n or 1
    if count > service.most_images:
        raise ApiError(400, f"n={count}: give at most {service.most_images}", param="n")
    if request.guidance_scale not in (None, 1) and not about["guides"]:
        raise ApiError(400, "guidance_scale: this model has no classifier-free guidance", param="guidance_scale")
    size = _size(request.size, about)
    prompt = _prompt(request.prompt, service, about)
    ladder, first, scale = _accepted(request, service, about)
    negative = _negative(request.negative_prompt or "", service, about, scale)
    seed = secrets.randbelow(2**31) if request.seed is None else request.seed
    if seed + count > 2**63:
        raise ApiError(400, f"seed={seed}: give less than 2**63 - n", param="seed")
    patience = (request.deadline_ms or service.deadline_ms) / 1e3
    return Job(
        id=secrets.token_hex(8),
        prompt=prompt,
        arrival=now,
        deadline=now + patience,
        settings=ladder,
        first=first,
        seeds=tuple(range(seed, seed + count)),
        guidance_scale=scale,
        size=size,
        negative_prompt=negative,
        output_format=request.output_format or "png",
        previews=(request.partial_images or 0) if request.stream else 0,
    )


def _accepted(
    request: ImageRequest, service: ServiceSettings, about: dict[str, Any]
) -> tuple[tuple[Setting, ...], int, float]:
    """What a request accepts of the service's ladder, where that begins, and its guidance scale."""
    own, budgets = service.scale(about["guidance_scale"]), about["budgets"]
    scale = own if request.guidance_scale is None else float(request.guidance_scale)
    if request.guidance_budget is not None and scale == 1:
        raise ApiError(400, "guidance_budget: goes with a guidance_scale other than 1", param="guidance_budget")
    weak = request.guidance_budget if request.guidance_budget is not None else service.guidance_budget or None
    steps = request.num_inference_steps
    if steps is not None and steps > service.most_steps:
        message = f"num_inference_steps={steps}: give at most {service.most_steps}"
        raise ApiError(400, message, param="num_inference_steps")
    ladder = service.ladder(budgets)
    accepted, first = qualities(ladder)[request.quality or "auto"]
    if request.budget is not None:
        if request.quality not in (None, "auto"):
            raise ApiError(400, f"budget, quality={request.quality!r}: give one of them", param="budget")
        num_latents = _resolved("budget", request.budget, budgets)
        accepted, first = (replace(ladder[-1], budget=num_latents),), 0
    if steps is not None:
        # The rungs with fewer steps stand for their budget; one of each remains.
        same = [(place, replace(rung, steps=steps)) for place, rung in enumerate(accepted)]
        last = [(place, rung) for place, rung in same if rung not in [other for _, other in same[place + 1 :]]]
        rising = sorted((rung for _, rung in last), key=lambda rung: rung.budget or 0)
        accepted, first = tuple(rising), first + last[0][0]
    weak_latents = _resolved("guidance_budget", weak, budgets) if weak is not None and scale != 1 else None
    return tuple(guided(rung, scale, weak_latents, budgets) for rung in accepted), first, scale


def _resolved(name: str, value: Any, budgets: tuple[int, ...]) -> int | None:
    try:
        return resolve_budget(value[:64] if isinstance(value, str) else value, budgets)
    except (ValueError, OverflowError) as error:
        raise ApiError(400, str(error).replace("budget=", f"{name}=", 1)[:300], param=name) from None


def _prompt(prompt: str | int, service: ServiceSettings, about: dict[str, Any]) -> str:
    text = str(prompt).strip()[: service.most_prompt + 1]
    if not text:
        raise ApiError(400, "prompt: empty", param="prompt")
    if len(text) > service.most_prompt:
        raise ApiError(400, f"prompt: give at most {service.most_prompt} characters", param="prompt")
    if about["text"]:
        return text
    names, classes = about["class_names"], about["classes"]
    try:
        (number,) = class_numbers([text], names, classes)
    except ValueError as error:
        raise ApiError(400, str(error).replace("labels=", "prompt=", 1), param="prompt") from None
    if not 0 <= number < classes:
        raise ApiError(400, f"prompt={text[:64]!r}: classes are 0 to {classes - 1}", param="prompt")
    return str(number)


def _negative(text: str, service: ServiceSettings, about: dict[str, Any], scale: float) -> str:
    if text and not about["negative_prompt"]:
        raise ApiError(400, "negative_prompt: this model takes none; leave it out", param="negative_prompt")
    if text and not scale > 1:
        raise ApiError(400, "negative_prompt: goes with a guidance_scale above 1", param="negative_prompt")
    if len(text) > service.most_prompt:
        message = f"negative_prompt: give at most {service.most_prompt} characters"
        raise ApiError(400, message, param="negative_prompt")
    return text


def _size(size: str | None, about: dict[str, Any]) -> tuple[int, int] | None:
    """(width, height), or None for the model's own."""
    own, multiple = tuple(about["size"]), about["multiple"]
    if size in (None, "auto", f"{own[0]}x{own[1]}"):
        return None
    if not multiple:
        message = f"size={str(size)[:32]!r}: this model makes {own[0]}x{own[1]}; give that, or auto"
        raise ApiError(400, message, param="size")
    try:
        width, height = parse_size(str(size))
    except ValueError as error:
        raise ApiError(400, str(error), param="size") from None
    if width % multiple or height % multiple or width * height > own[0] * own[1]:
        message = f"size={size}: give multiples of {multiple}, of at most {own[0] * own[1]} pixels ({own[0]}x{own[1]})"
        raise ApiError(400, message, param="size")
    return width, height


def _no_constant(name: str) -> None:
    raise ValueError(name)
