"""The settings of sampling as one object, shared by `elit.sample`, commands, pictures, tables, plans and services."""

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, Self, cast, get_args

from elit.budgets import Budget, Schedule, format_budget, is_list, one_schedule, parse_budget, saved_schedule
from elit.config import require
from elit.flow.guidance import Guidance, make_guidance

GuidanceKind = Literal["none", "cfg", "ag", "ccfg"]
Solver = Literal["euler", "heun"]
Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How samples are made; what they are of (classes, prompts, their number) stands beside it."""

    steps: int = 40
    budget: Schedule = None
    """One for all steps (latents per group, a share, text), a schedule as text or a function of t, or a tuple with one
    a step; None = all latents."""
    sample_budgets: tuple[Budget, ...] = ()
    """In its place, one budget a sample."""
    guidance: Guidance | None = None
    solver: str = "euler"
    shift: float = 1.0
    """More of the steps near noise; 1 is even."""
    cache: float = 0.0
    """Threshold of step caching; 0 is off."""
    seed: int = 0
    """Of the first sample; the next ones count up."""
    dtype: str | None = None
    """Of the network; None = as it is."""

    def __post_init__(self) -> None:
        if isinstance(self.budget, str):
            object.__setattr__(self, "budget", _read_budget(self.budget))
        elif is_list(self.budget):
            object.__setattr__(self, "budget", tuple(cast(Sequence[Budget], self.budget)))
        object.__setattr__(self, "sample_budgets", tuple(self.sample_budgets))
        require(self.steps >= 1, "steps", self.steps, "at least 1")
        require(0 < self.shift < math.inf, "shift", self.shift, "above 0")
        require(0 <= self.cache < math.inf, "cache", self.cache, "at least 0")
        for name, valid in (("solver", get_args(Solver)), ("dtype", (None, *get_args(Precision)))):
            require(getattr(self, name) in valid, name, getattr(self, name), f"one of {', '.join(filter(None, valid))}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values as JSON has them, which `from_dict` reads. Raises ValueError for a budget that is a function."""
        if callable(self.budget):
            raise ValueError("budget must be text to be written, got a function of t")
        several = self.budget if isinstance(self.budget, tuple) else ()
        guidance: dict[str, Any] = {"guidance": "none"}
        if self.guidance is not None:
            guidance = {"guidance": self.guidance.kind, "scale": self.guidance.scale}
            if self.guidance.kind != "cfg":
                guidance["guidance_budget"] = _budget_text(self.guidance.budget)
            guidance["guidance_interval"] = list(self.guidance.interval)
        return {
            "steps": self.steps,
            "budget": "full" if several else _budget_text(self.budget),
            "step_budgets": [_budget_text(each) for each in several],
            "sample_budgets": [_budget_text(each) for each in self.sample_budgets],
            **guidance,
            "solver": self.solver,
            "shift": self.shift,
            "cache": self.cache,
            "seed": self.seed,
            "dtype": self.dtype,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From the plain values of a picture, a command, a row of a sweep's table or of a profile, of any version.

        Other keys are passed over. Raises ValueError for values of the wrong kind.
        """
        given = {name: value for name, value in values.items() if value is not None}
        steps = _value(given, "steps", int, 40)
        budget = given.get("budget")
        if several := _value(given, "step_budgets", (list, tuple), ()):
            budget = [_read_budget(each) for each in several]
        elif isinstance(budget, str):
            budget = _saved_budget(budget) if "detector" in given else _read_budget(budget)
        elif isinstance(budget, bool) or not isinstance(budget, int | float | list | tuple | None):
            raise ValueError(f"budget must be text, got {budget!r}")
        return cls(
            steps=steps,
            budget=budget,
            sample_budgets=tuple(map(_read_budget, _value(given, "sample_budgets", (list, tuple), ()))),
            guidance=_read_guidance(given),
            solver=given.get("solver", "euler"),
            shift=float(_value(given, "shift", (int, float), 1.0)),
            cache=float(_value(given, "cache", (int, float), 0.0)),
            seed=_value(given, "seed", int, 0),
            dtype=given.get("dtype"),
        )

    def describe(self) -> str:
        """One line, without what is as usual: "8 steps, budget 50%, ccfg 2 at budget 1"."""
        parts = [f"{self.steps} step{'s' * (self.steps != 1)}"]
        if isinstance(self.budget, tuple):
            runs = [(budget, len(list(run))) for budget, run in itertools.groupby(self.budget)]
            parts.append("budget " + ", ".join(f"{_budget_text(budget)}×{count}" for budget, count in runs))
        elif self.budget is not None:
            parts.append("budget " + ("a function of t" if callable(self.budget) else _budget_text(self.budget)))
        if self.guidance is not None:
            weak = "" if self.guidance.kind == "cfg" else f" at budget {_budget_text(self.guidance.budget)}"
            low, high = self.guidance.interval
            parts.append(
                f"{self.guidance.kind} {self.guidance.scale:g}{weak}"
                + (f" for t = {low:g} to {high:g}" if (low, high) != (0, 1) else "")
            )
        parts += [self.solver] * (self.solver != "euler")
        parts += [f"shift {self.shift:g}"] * (self.shift != 1)
        parts += [f"cache {self.cache:g}"] * (self.cache != 0)
        return ", ".join(parts)


def make_sampling(
    sampling: Sampling,
    *,
    budget: Schedule = None,
    step_budgets: Sequence[Budget] | None = None,
    sample_budgets: Sequence[Budget] | None = None,
    **changes: Any,
) -> Sampling:
    """`sampling` with those settings that are not None. Raises ValueError for two kinds of budgets."""
    changes = {name: value for name, value in changes.items() if value is not None}
    if (schedule := one_schedule(budget, step_budgets, sample_budgets)) is not None or sample_budgets is not None:
        changes |= {"budget": schedule, "sample_budgets": sample_budgets or ()}
    return replace(sampling, **changes)


def _budget_text(budget: Any) -> str:
    if budget is None:
        return "full"
    return budget if isinstance(budget, str) else format_budget(budget)


def _read_budget(text: Any) -> Any:
    """A budget as typed; a schedule stays text."""
    if not isinstance(text, str):
        if isinstance(text, int | float) and not isinstance(text, bool):
            return text
        raise ValueError(f"budget must be text, got {text!r}")
    return text if "@" in text else parse_budget(text)


def _saved_budget(text: str) -> Schedule:
    """The column `budget` of a sweep's table: latents, "all", a schedule, or "8×4, 16×4" for four steps each."""
    if text == "all":
        return None
    if "×" in text:
        runs = [re.fullmatch(r"(\d+)×(\d+)", run) for run in text.split(", ")]
        if not all(runs):
            raise ValueError(f"budget must be like '8×4, 16×4', got {text!r}")
        return tuple(int(run[1]) for run in runs if run for _ in range(int(run[2])))
    return int(text) if text.isdigit() else saved_schedule(text)


def _read_guidance(values: Mapping[str, Any]) -> Guidance | None:
    """The guidance in a mapping of plain values; a profile's rows call it kind and weak, a recipe has it nested."""
    if isinstance(nested := values.get("guidance"), Mapping):
        values = {
            **{f"guidance_{name}": nested.get(name) for name in ("budget", "interval")},
            **{"guidance": nested.get("kind"), "scale": nested.get("scale")},
        }
        values = {name: value for name, value in values.items() if value is not None}
    kind = values.get("guidance", values.get("kind", "none"))
    require(kind in get_args(GuidanceKind), "guidance", kind, f"one of {', '.join(get_args(GuidanceKind))}")
    if kind == "none":
        return None
    weak = values.get("guidance_budget", values.get("weak", 1))
    low_high = values.get("guidance_interval", (values.get("guidance_low", 0.0), values.get("guidance_high", 1.0)))
    if not isinstance(low_high, list | tuple) or len(low_high) != 2 or not all(map(_is_number, low_high)):
        raise ValueError(f"guidance_interval must be two numbers, got {low_high!r}")
    scale = float(_value(values, "scale", (int, float), 1.5))
    return make_guidance(kind, scale, _read_budget(weak), (float(low_high[0]), float(low_high[1])))


def _value(values: Mapping[str, Any], name: str, kind: type | tuple[type, ...], default: Any) -> Any:
    value = values.get(name, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        names = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{name} must be {names}, got {value!r}")
    return value


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Every option of `elit sample` that decides what its pictures look like."""

    labels: tuple[str, ...] = ()
    """Classes, by number or name, in turn; default: all of the model's."""
    prompts: tuple[str, ...] = ()
    """Texts, in turn, for a text-conditional model."""
    text_encoder: str | None = None
    """Hugging Face name or folder of the encoder that a text-conditional model was trained with; default: as saved."""
    count: int | None = None
    """How many images; default: one a label or prompt, at most 64."""
    budget: str = "full"
    """Latents per group (8; 1 is one latent), a share of them (50%), all (100%), or a schedule over t
    (50%@0-0.5,100%@0.5-1)."""
    step_budgets: tuple[str, ...] = ()
    """Instead, one budget a step."""
    sample_budgets: tuple[str, ...] = ()
    """Instead, one budget an image; that many images are made."""
    guidance: GuidanceKind = "none"
    """cfg drops the class in the second branch, ag lowers its budget, ccfg does both."""
    scale: float = 1.5
    """Guidance scale; 1 is off."""
    guidance_budget: str = "1"
    """Budget of the second branch of ag and ccfg: latents per group (1) or a share of them (25%)."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times between which guidance acts; 0 = noise, 1 = data."""
    steps: int = 40
    """Solver steps."""
    solver: Solver = "euler"
    """heun is second order and evaluates twice a step."""
    shift: float = 1.0
    """More of the steps near noise; 1 is even."""
    cache: float = 0.0
    """Step caching: a step reuses the last output while the time embedding has moved by less, relatively; 0 is off."""
    seed: int = 0
    """Seed of the first image; the next ones count up."""
    batch_size: int = 64
    """Images at a time; changes an image by rounding at most."""
    dtype: Precision = "float32"
    """Of the network; the solver's state stays float32."""

    def guide(self) -> Guidance | None:
        """elit.CFG, AG or CCFG, or None. Raises ValueError for a scale, budget or interval that cannot be."""
        return make_guidance(self.guidance, self.scale, self.guidance_budget, self.guidance_interval)

    def arguments(self) -> dict[str, Any]:
        """Of `elit.sample`, without what it is of and the seed."""
        return {
            "steps": self.steps,
            "budget": None if self.budget == "full" else as_schedule(self.budget),
            "step_budgets": [parse_budget(each) for each in self.step_budgets] or None,
            "sample_budgets": [parse_budget(each) for each in self.sample_budgets] or None,
            "guidance": self.guide(),
            "solver": self.solver,
            "shift": self.shift,
            "cache": self.cache,
        }

    @classmethod
    def from_values(cls, values: Mapping[str, Any], where: str) -> Self:
        """From plain values as JSON gives them. Raises ValueError for unknown names and values of another kind.

        where: what they are of, for the message.
        """
        known = {each.name: each for each in fields(SampleSettings)}
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"{where}: unknown setting {unknown[0]!r}")
        return cls(**{name: _checked(name, value, where) for name, value in values.items()})


@dataclass(frozen=True, kw_only=True)
class SampleRecord:
    """What a picture says of how it was made: enough to make it again."""

    model: str
    """As it was named: a folder, or a model in the box."""
    weights: str
    """`weights_fingerprint` of it."""
    settings: SampleSettings
    row: int | None = None
    """Which of the images the picture shows; None: all of them."""
    made_with: dict[str, str] = field(default_factory=dict)
    """Versions and device, on which rounding depends."""

    def to_text(self) -> str:
        """JSON, ASCII."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str, where: str) -> "SampleRecord":
        """Raises ValueError for anything but what `to_text` writes; where: the picture, for the message."""
        try:
            content = json.loads(text)
            settings = SampleSettings.from_values(content.pop("settings"), where)
            record = cls(settings=settings, **content)
        except (json.JSONDecodeError, TypeError, KeyError, AttributeError, RecursionError):
            raise ValueError(f"{where}: what it says of its settings is damaged") from None
        strings = [record.model, record.weights, *record.made_with, *record.made_with.values()]
        row = record.row is None or (type(record.row) is int and record.row >= 0)
        if not all(isinstance(each, str) for each in strings) or not row:
            raise ValueError(f"{where}: what it says of its settings is damaged")
        return record


def as_schedule(budget: str) -> Schedule:
    """A budget as typed; a schedule stays text."""
    return budget if "@" in budget else parse_budget(budget)


def _checked(name: str, value: Any, where: str) -> Any:
    """`value` as the setting `name` has it. Raises ValueError."""
    kind = SampleSettings.__annotations__[name]
    if value is None and name in ("count", "text_encoder"):
        return None
    if name in ("labels", "prompts", "step_budgets", "sample_budgets"):
        good = isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
        value = tuple(value) if good else value
    elif name == "guidance_interval":
        good = isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value))
        value = tuple(map(float, value)) if good else value
    elif get_args(kind) and value in get_args(kind):
        good = True
    elif kind is float:
        good = _is_number(value)
        value = float(value) if good else value
    elif kind is str or name == "text_encoder":
        good = isinstance(value, str)
    else:
        good = kind in (int, int | None) and type(value) is int
    if not good:
        raise ValueError(f"{where}: {name}={value!r} is no valid value")
    return value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
