"""The settings of sampling as one object, shared by `elit.sample`, commands, pictures, tables, plans and services."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, cast, get_args

from elit.budgets import Budget, Schedule, format_budget, is_list, parse_budget, saved_schedule
from elit.config import require
from elit.files import Json
from elit.flow.guidance import Guidance, make_guidance

GuidanceKind = Literal["none", "cfg", "ag", "ccfg"]
Solver = Literal["euler", "heun"]
Precision = Literal["float32", "bfloat16", "float16"]
STEPS = 40  # Of every run that names none, as in the paper; docs/inference.md has what more and fewer give.
NUMBERS = {"steps": int, "shift": float, "cache": float, "seed": int}  # settings that are numbers


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How samples are made; what they are of (classes, prompts, their number) stands beside it."""

    steps: int = STEPS
    budget: Schedule = None  # One for all steps, a schedule (text, a function of t), or a tuple with one a step.
    sample_budgets: tuple[Budget, ...] = ()  # One a sample, in the place of `budget`.
    guidance: Guidance | None = None
    solver: str = "euler"
    shift: float = 1.0  # More of the steps near noise; 1 is even.
    cache: float = 0.0  # Threshold of step caching; 0 is off.
    seed: int = 0  # Seed of the first sample; the next ones count up.
    dtype: str | None = None  # Dtype of the network; None = as it is.

    def __post_init__(self) -> None:
        if isinstance(self.budget, str):
            object.__setattr__(self, "budget", _read_budget(self.budget))
        elif is_list(self.budget):
            object.__setattr__(self, "budget", tuple(cast(Sequence[Budget], self.budget)))
        object.__setattr__(self, "sample_budgets", tuple(self.sample_budgets))
        if self.dtype is not None:  # torch's own has this text
            object.__setattr__(self, "dtype", f"{self.dtype}".removeprefix("torch."))
        if self.sample_budgets and self.budget is not None:
            raise ValueError("cannot take budget and sample_budgets at once: give one of them")
        require(self.steps >= 1, "steps", self.steps, "at least 1")
        require(0 < self.shift < math.inf, "shift", self.shift, "above 0")
        require(0 <= self.cache < math.inf, "cache", self.cache, "at least 0")
        for name, valid in (("solver", get_args(Solver)), ("dtype", (None, *get_args(Precision), "float64"))):
            require(getattr(self, name) in valid, name, getattr(self, name), f"one of {', '.join(filter(None, valid))}")

    def to_dict(self) -> Json:
        """Plain values as JSON has them, which `from_dict` reads. Raises ValueError for a budget that is a function."""
        if callable(self.budget):
            raise ValueError("budget must be text to be written, got a function of t")
        of_steps = self.budget if isinstance(self.budget, tuple) else ()
        plain: Json = {name: getattr(self, name) for name in ("steps", "solver", "shift", "cache", "seed", "dtype")}
        plain |= {"budget": "full" if of_steps else _budget_text(self.budget), "guidance": "none"}
        plain |= {"step_budgets": [*map(_budget_text, of_steps)]}
        plain |= {"sample_budgets": [*map(_budget_text, self.sample_budgets)]}
        if (guidance := self.guidance) is not None:
            plain |= {"guidance": guidance.kind, "scale": guidance.scale, "guidance_interval": list(guidance.interval)}
        if guidance is not None and guidance.kind != "cfg":
            plain["guidance_budget"] = _budget_text(guidance.budget)
        return plain

    @classmethod
    def from_dict(cls, values: Json) -> Self:
        """Reads the values of a picture, a command, a table or a profile, of any version; other keys are ignored."""
        given = {name: value for name, value in values.items() if value is not None}
        for name, kind in {**NUMBERS, "scale": float}.items():
            require(type(given.get(name, 1)) in (int, kind), name, given.get(name), f"of type {kind.__name__}")
        plain: Json = {name: given[name] for name in (*NUMBERS, "solver", "dtype") if name in given}
        each = tuple(map(_read_budget, given.get("sample_budgets", ())))
        return cls(budget=_read_schedule(given), sample_budgets=each, guidance=_read_guidance(given), **plain)

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
            between = f" for t = {low:g} to {high:g}" if (low, high) != (0, 1) else ""
            parts.append(f"{self.guidance.kind} {self.guidance.scale:g}{weak}{between}")
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
    if is_list(budget):
        raise ValueError(f"budget must be one budget, got {budget!r}; give step_budgets or sample_budgets")
    named = {"budget": budget, "step_budgets": step_budgets, "sample_budgets": sample_budgets}
    given = [name for name, value in named.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"cannot take {' and '.join(given)} at once: give one of them")
    changes = {name: value for name, value in changes.items() if value is not None}
    if given:
        changes |= {"budget": budget if step_budgets is None else step_budgets, "sample_budgets": sample_budgets or ()}
    return replace(sampling, **changes)


def _budget_text(budget: Any) -> str:
    if budget is None:
        return "full"
    return budget if isinstance(budget, str) else format_budget(budget)


def _read_budget(text: Any) -> Any:
    """A budget as typed; a schedule stays text."""
    require(type(text) in (str, int, float), "budget", text, "text")
    return parse_budget(text) if isinstance(text, str) and "@" not in text else text


def _read_schedule(values: Json) -> Schedule:
    """The budget of a picture, or of a row of a table: there also "all", or "8×4, 16×4" for four steps each."""
    budget, several = values.get("budget"), values.get("step_budgets")
    if several:
        require(budget in (None, "full"), "budget", budget, "left out beside step_budgets")
        return [_read_budget(each) for each in several]
    if budget is None or "detector" not in values:
        return budget if budget is None else _read_budget(budget)
    if "×" in budget:
        runs = [map(int, run.split("×")) for run in budget.split(", ")]
        return [latents for latents, count in runs for _ in range(count)]
    return None if budget == "all" else int(budget) if budget.isdigit() else saved_schedule(budget)


def _read_guidance(values: Json) -> Guidance | None:
    """The guidance of a picture or a table; rows of a profile call it kind and weak."""
    kind = values.get("guidance", values.get("kind", "none"))
    scale = float(values.get("scale", 1.5))
    interval = values.get("guidance_interval", (values.get("guidance_low", 0.0), values.get("guidance_high", 1.0)))
    pair = isinstance(interval, list | tuple) and [type(t) in (int, float) for t in interval] == [True, True]
    require(pair, "guidance_interval", interval, "two numbers")
    weak = _read_budget(values.get("guidance_budget", values.get("weak", 1)))
    return make_guidance(kind, scale, weak, (float(interval[0]), float(interval[1])))
