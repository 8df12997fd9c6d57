"""A client's JSON as a request for a replica: read, limited, checked. Nothing in it is opened or run."""

import re
import secrets
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from elit.budgets import resolve_budget
from elit.config import require
from elit.files import Json
from elit.models.conditioning import class_numbers
from elit.pretrained import model_folder
from elit.sampling.settings import Sampling
from elit.serve.settings import ServiceSettings, parse_size

Budget = Annotated[str, Field(max_length=64)] | int | float
MAX_PROMPT = 1000  # Characters.
NESTED = ("extra_params", "diffusers_kwargs")  # Objects in which clients of other engines put our parameters.
HARMLESS = ["background", "moderation", "style", "output_compression", "safety_identifier", "generator_device"]
MAX_IGNORED = 20  # Names in the note of an answer.


class ApiError(Exception):
    """An answer in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry: int = 0):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry = status, message, param, code, retry

    def body(self) -> Json:
        kind = {429: "rate_limit_error"}.get(self.status, ("invalid_request", "server")[self.status >= 500] + "_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Parameters(BaseModel):
    """The body of POST /v1/images/generations: OpenAI's parameters, ours, then other engines'."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    prompt: str | int
    model: str = ""
    n: int = Field(1, ge=1)
    size: str = "auto"
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    quality: Literal["low", "medium", "high", "auto", "standard", "hd"] = "auto"
    user: str = Field("", max_length=256)
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3)
    budget: Budget | None = None
    deadline_ms: float | None = Field(None, gt=0, le=3_600_000)
    seed: int | None = Field(None, ge=0, lt=2**63)
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0, le=100)
    guidance_budget: Budget | None = None
    negative_prompt: str = Field("", max_length=MAX_PROMPT)

    width: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)
    true_cfg_scale: float | None = Field(None, ge=0, le=100)  # before guidance_scale, which is another thing there
    return_stage_metrics: bool = False
    extra_params: dict[str, object] = {}
    diffusers_kwargs: dict[str, object] = {}

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, values: Any) -> Any:
        """Null stands for the default; what stands beside an inner object goes before what it holds."""
        if type(values) is not dict:
            return values
        parts = [inner for name in NESTED if type(inner := values.get(name)) is dict] + [values]
        return {name: each for part in parts for name, each in part.items() if each is not None}


@dataclass(frozen=True, kw_only=True)
class Request:
    """A checked request. Times are seconds on any one clock: the wall's in a service, its own in a simulator."""

    id: str
    arrival: float
    deadline: float
    settings: tuple[Sampling, ...]  # those it accepts, from the least to the preferred
    first: int = 0  # rung of the ladder that settings[0] is
    seeds: tuple[int, ...] = (0,)  # one an image
    prompt: str = ""
    negative_prompt: str = ""
    size: tuple[int, int] | None = None  # (width, height); None = the model's own
    quality: str = "auto"
    response_format: str = "b64_json"
    output_format: str = "png"
    stream: bool = False
    previews: int = 0
    stage_metrics: bool = False
    ignored: tuple[str, ...] = ()  # parameters without a meaning here

    @property
    def images(self) -> int:
        return len(self.seeds)

    @property
    def least(self) -> Sampling:
        return self.settings[0]

    def at(self, level: int) -> Sampling:
        """The rung `level`, or the nearest that it accepts."""
        return self.settings[min(max(level - self.first, 0), len(self.settings) - 1)]


def read_request(body: bytes, service: ServiceSettings, model: Json, now: float) -> Request:
    """The request in a body that arrives at `now`. model: its description (`Replica.describe`)."""
    try:
        return _make_request(Parameters.model_validate_json(body), service, model, now)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = str(first["loc"][0])[:64] if first["loc"] else "body"
        raise ApiError(400, f"{name}: {first['msg'][:200]}", param=name) from None
    except ValueError as error:
        message = " ".join(str(error).split())[:300]
        raise ApiError(400, message, param=re.split(r"\W", message)[0]) from None


def _make_request(wanted: Parameters, service: ServiceSettings, model: Json, now: float) -> Request:
    """Messages of its errors begin with the parameter's name."""
    if wanted.model not in ("", "default", service.name, str(model_folder(service.model))):
        message = f"model: {wanted.model[:64]!r} is not served here; give {service.name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
    require(wanted.n <= service.most_images, "n", wanted.n, f"at most {service.most_images}")
    seed = secrets.randbelow(2**31) if wanted.seed is None else wanted.seed
    require(seed + wanted.n <= 2**63, "seed", seed, "less than 2**63 - n")
    ignored = [name[:64] for name in wanted.model_extra or () if name not in HARMLESS]
    if service.strict and ignored:
        raise ApiError(400, f"{ignored[0]}: no such parameter", param=ignored[0])
    if wanted.true_cfg_scale is not None:
        ignored += ["guidance_scale"] * (wanted.guidance_scale not in (None, wanted.true_cfg_scale))
        wanted.guidance_scale = wanted.true_cfg_scale
    settings, first = _accepted(wanted, service, model)
    if wanted.negative_prompt:
        guidance = settings[0].guidance
        require(model["negative_prompt"], "negative_prompt", "one", "left out: this model has none")
        guided = guidance is not None and guidance.scale > 1
        require(guided, "negative_prompt", "one", "left out, or have a guidance_scale above 1")
    return Request(
        id=secrets.token_hex(8),
        arrival=now,
        deadline=now + (wanted.deadline_ms or service.deadline_ms) / 1e3,
        settings=settings,
        first=first,
        seeds=tuple(range(seed, seed + wanted.n)),
        prompt=_prompt(wanted.prompt, model),
        size=_size(wanted, model),
        previews=wanted.partial_images if wanted.stream else 0,
        stage_metrics=wanted.return_stage_metrics,
        ignored=tuple(ignored[:MAX_IGNORED]),
        **wanted.model_dump(include={"negative_prompt", "quality", "response_format", "output_format", "stream"}),
    )


def _accepted(wanted: Parameters, service: ServiceSettings, model: Json) -> tuple[tuple[Sampling, ...], int]:
    """The part of the service's ladder that a request accepts, and where that begins."""
    budgets, default, steps = model["budgets"], model["guidance_scale"], wanted.num_inference_steps
    scale, weak = wanted.guidance_scale, wanted.guidance_budget
    try:
        guidance = service.guidance(budgets, default, scale, weak)
    except ValueError as error:
        raise ValueError(f"guidance_{error}") from None
    require(guidance is None or model["guides"], "guidance_scale", scale, "left out: this model has no guidance")
    require(guidance is not None or weak is None, "guidance_scale", scale, "other than 1 where guidance_budget is set")
    ladder = service.ladder(budgets, default)
    middle, top = len(ladder) // 2, len(ladder) - 1
    first, last = {"low": (0, middle), "medium": (middle, top), "high": (top, top), "hd": (top, top)}.get(
        wanted.quality, (0, top)
    )
    accepted = ladder[first : last + 1]
    if wanted.budget is not None:
        require(wanted.quality in ("auto", "standard"), "quality", wanted.quality, "left out where budget is given")
        accepted = (replace(ladder[-1], budget=resolve_budget(wanted.budget, budgets)),)
    if steps is not None:  # rungs with fewer steps stand for their budget
        require(steps <= service.most_steps, "num_inference_steps", steps, f"at most {service.most_steps}")
        places: dict[Any, int] = {rung.budget: place for place, rung in enumerate(accepted)}
        first += min(places.values())
        rising = sorted(places, key=lambda count: count or 0)
        accepted = tuple(replace(ladder[-1], steps=steps, budget=count) for count in rising)
    return tuple(replace(rung, guidance=guidance) for rung in accepted), first


def _prompt(prompt: str | int, model: Json) -> str:
    text = str(prompt).strip()[: MAX_PROMPT + 1]
    require(1 <= len(text) <= MAX_PROMPT, "prompt", text[:32], f"1 to {MAX_PROMPT} characters")
    if model["text"]:
        return text
    try:
        (number,) = class_numbers([text], model["class_names"], model["classes"])
    except ValueError as error:
        raise ValueError(re.sub("^labels?", "prompt", str(error))) from None
    return str(number)


def _size(wanted: Parameters, model: Json) -> tuple[int, int] | None:
    """(width, height), or None for the model's own."""
    own, multiple, size = tuple(model["size"]), model["multiple"], wanted.size
    if wanted.width is not None or wanted.height is not None:
        given = f"{wanted.width}x{wanted.height}"
        missing = "width" if wanted.width is None else "height"
        require(wanted.width is not None and wanted.height is not None, missing, None, "given beside the other side")
        require(size in ("auto", given), "size", size[:32], f"{given}, as width and height, or left out")
        size = given
    if size in ("auto", f"{own[0]}x{own[1]}"):
        return None
    require(bool(multiple), "size", size[:32], f"{own[0]}x{own[1]}, the size of this model, or auto")
    width, height = parse_size(size)
    valid = not width % multiple and not height % multiple and width * height <= own[0] * own[1]
    require(valid, "size", size, f"multiples of {multiple}, at most {own[0] * own[1]} pixels ({own[0]}x{own[1]})")
    return width, height
