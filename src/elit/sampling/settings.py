"""The settings of sampling as one object, shared by `elit.sample`, commands, pictures, tables, plans and services."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
        if self.sample_budgets and self.budget is not None:
            raise ValueError("cannot take budget and sample_budgets at once: give one of them")
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
            if budget not in (None, "full"):
                raise ValueError("cannot take budget and step_budgets at once: give one of them")
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
    pair = isinstance(low_high, list | tuple) and [type(each) in (int, float) for each in low_high] == [True, True]
    require(pair, "guidance_interval", low_high, "two numbers")
    scale = float(_value(values, "scale", (int, float), 1.5))
    return make_guidance(kind, scale, _read_budget(weak), (float(low_high[0]), float(low_high[1])))


def _value(values: Mapping[str, Any], name: str, kind: type | tuple[type, ...], default: Any) -> Any:
    value = values.get(name, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        names = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{name} must be {names}, got {value!r}")
    return value
