"""Requests of the page: a class or prompt with its sampling settings, as values of the controls and as a link."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from urllib.parse import urlencode

from elit.budgets import resolve_budget, schedule_budgets
from elit.config import require
from elit.flow.guidance import CCFG, make_guidance
from elit.sampling.settings import Sampling

MAX_STEPS, MAX_SEED, MAX_SCALE, MAX_PROMPT = 64, 2**31 - 1, 8, 2000
DEFAULT_SCALE = 1.5
CONTROLS = ("of", "seed", "latents", "schedule", "steps", "guidance", "scale", "guidance_budget")

N = TypeVar("N", int, float)


@dataclass(frozen=True)
class Request:
    """A class or prompt, and how to sample it. Raises ValueError beyond the page's limits."""

    condition: str
    sampling: Sampling

    def __post_init__(self) -> None:
        sampling, length = self.sampling, len(self.condition)
        scale = sampling.guidance.scale if sampling.guidance else 1.0
        require(self.condition.strip() != "", "the class or prompt", self.condition, "a text")
        require(length <= MAX_PROMPT, "the prompt", f"{length} characters", f"at most {MAX_PROMPT} characters")
        require(0 <= sampling.seed <= MAX_SEED, "seed", sampling.seed, f"0 to {MAX_SEED}")
        require(1 <= sampling.steps <= MAX_STEPS, "steps", sampling.steps, f"1 to {MAX_STEPS}")
        require(0 <= scale <= MAX_SCALE, "scale", scale, f"0 to {MAX_SCALE}")

    def updated(self, values: Mapping[str, object]) -> "Request":
        """This request with the values of a link. Raises ValueError."""
        new: dict[str, Any] = self.values() | dict(values)
        scale = _number("scale", new["scale"], float)
        guidance = make_guidance(str(new["guidance"]), scale, str(new["guidance_budget"]))
        seed, steps = (_number(name, new[name], int) for name in ("seed", "steps"))
        budget = None if self.sampling.budget is None else new["budget"]  # None for a baseline
        sampling = replace(self.sampling, seed=seed, steps=steps, budget=budget, guidance=guidance)
        return Request(str(new["of"]), sampling)

    def values(self) -> dict[str, Any]:
        """The values of a link, by the names of `Sampling.to_dict`."""
        values = {"scale": DEFAULT_SCALE, "guidance_budget": 1} | self.sampling.to_dict()
        names = ("seed", "budget", "steps", "guidance", "scale", "guidance_budget")
        return {"of": self.condition} | {name: values[name] for name in names}

    def query(self) -> str:
        return urlencode(self.values())

    def updated_by_controls(self, controls: Sequence[object]) -> "Request":
        """This request with the values of the controls, in the order of `CONTROLS`. Raises ValueError."""
        values = {name: "" if value is None else value for name, value in zip(CONTROLS, controls, strict=True)}
        latents, schedule = values.pop("latents"), values.pop("schedule")
        return self.updated(values | {"budget": schedule or latents})

    def controls(self, budgets: Sequence[int]) -> list[object]:
        """The values of the controls. Raises ValueError for a budget that the network does not have."""
        values, guidance = self.values(), self.sampling.guidance
        latents = schedule_budgets(self.sampling.budget, [1.0], budgets)[0] or 1
        schedule = values["budget"] if "@" in values["budget"] else ""
        weak = budgets[0] if budgets else 1
        if guidance is not None and guidance.budget is not None:
            weak = resolve_budget(guidance.budget, budgets)
        settings = [values[name] for name in ("steps", "guidance", "scale")]
        return [self.condition, values["seed"], latents, schedule, *settings, weak]


def examples(sampling: Sampling, budgets: Sequence[int], guidance_kinds: Sequence[str]) -> list[tuple[str, Sampling]]:
    if not budgets:
        return []
    low, full = budgets[0], budgets[-1]
    quarter, half = (max(low, full // parts // low * low) for parts in (4, 2))
    named = {"all latents": full, "a quarter": quarter, "the fewest": low, "half → all": f"{half}@0-0.5,{full}@0.5-1"}
    plain = replace(sampling, guidance=None)
    settings = [(name, replace(plain, budget=budget)) for name, budget in named.items()]
    if "ccfg" in guidance_kinds:
        scale = sampling.guidance.scale if sampling.guidance else 2.0
        settings.append(("CCFG", replace(plain, budget=half, guidance=CCFG(scale, low))))
    return settings


def _number(name: str, value: object, kind: type[N]) -> N:
    try:
        return kind(str(value))
    except ValueError:
        raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}") from None
