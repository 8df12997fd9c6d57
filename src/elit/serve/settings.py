"""What the owner of a service decides: plain values, which go to replicas and into a Serve config as they are."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from elit.budgets import resolve_budget
from elit.serve.costs import Rung, Setting, ladder

KEY_VARIABLE = "ELIT_API_KEY"
STEPS = 20
"""At full quality, where neither the owner nor a sweep's table says it."""
CLUSTER_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""0 where Ray is on this machine alone, as it is on those systems: its own processes listen on loopback then."""


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """One service; `from_dict(to_dict())` gives it back."""

    model: str
    """Folder, or name of a model of the package."""
    name: str = ""
    """By which clients know it; "" = the folder's."""
    steps: int = STEPS
    least_steps: int | None = None
    """None = half of `steps`."""
    least_budget: str = ""
    """"" = the network's least."""
    rungs: tuple[Rung, ...] = ()
    """The ladder, from the least to full, as (steps, latents per group); () = made of `steps` and the least two."""
    guidance_scale: float | None = None
    """Of requests that name none; None = the model's own: 1, which is off, or a pipeline's default."""
    size: str = ""
    """Such as 1024x768, of requests that name none; "" = the model's own."""
    guidance_budget: str = ""
    """Of the second branch where there is guidance; "" = as many latents as the main one (CFG)."""
    deadline_ms: float = 5000.0
    """Of requests that name none."""
    device: str = "cpu"
    dtype: str = "float32"
    compile: bool = False
    exact: bool | None = None
    threads: int | None = None
    """Of a replica on a CPU; None = as torch chooses."""
    max_batch: int = 0
    """Images in progress at a time; 0 = as many as pay, at most 8."""
    max_queue: int = 64
    refuse: bool = True
    profile: str = ""
    """A file of elit profile; "" = the one in the model's folder or, without one, measured at the start."""
    most_images: int = 4
    most_steps: int = 100
    most_prompt: int = 1000
    """Characters."""
    most_body: int = 65536
    """Bytes."""
    body_seconds: float = 10.0
    """In which a request's body must have come."""
    needs_key: bool = False
    """Whether replicas must find an API key in the environment variable ELIT_API_KEY."""

    def __post_init__(self) -> None:
        for name in ("steps", "max_queue", "most_images", "most_steps", "most_prompt", "most_body"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1")
        object.__setattr__(self, "rungs", tuple((steps, budget) for steps, budget in self.rungs))
        if self.rungs and self.rungs[-1][0] != self.steps:
            raise ValueError(f"rungs={self.rungs}: the last must have steps={self.steps}")
        if not 0 < self.deadline_ms < math.inf:
            raise ValueError(f"deadline_ms={self.deadline_ms}: give milliseconds above 0")
        if self.steps > self.most_steps:
            raise ValueError(f"steps={self.steps}: most_steps is {self.most_steps}")
        if self.guidance_scale is not None and not 0 <= self.guidance_scale < math.inf:
            raise ValueError(f"guidance_scale={self.guidance_scale}: give a number >= 0; 1 is off")
        self.pixels()
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads={self.threads}: give at least 1")
        if self.max_batch < 0:
            raise ValueError(f"max_batch={self.max_batch}: give 0 or more")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ServiceSettings":
        """Raises ValueError for a name that is none of the settings."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"{unknown[0]}: no setting of a service; settings: {', '.join(sorted(known))}")
        return cls(**values)

    def ladder(self, budgets: Sequence[int], own_scale: float = 1.0) -> tuple[Setting, ...]:
        """The service's settings, from the floor to full, with its own guidance. own_scale: the model's."""
        if self.rungs:
            rungs = tuple(Setting(steps=steps, budget=resolve_budget(count, budgets)) for steps, count in self.rungs)
        else:
            least = resolve_budget(self.least_budget or None, budgets) if self.least_budget else None
            least_steps = self.least_steps if self.least_steps is not None else (self.steps + 1) // 2
            rungs = ladder(budgets, steps=self.steps, least=least, least_steps=least_steps)
        scale = self.scale(own_scale)
        return tuple(guided(rung, scale, self.guidance_budget or None, budgets) for rung in rungs)

    def scale(self, own: float) -> float:
        """Guidance scale of requests that name none. own: the model's."""
        return own if self.guidance_scale is None else self.guidance_scale

    def pixels(self) -> tuple[int, int] | None:
        """`size` as (width, height). Raises ValueError."""
        return parse_size(self.size) if self.size else None


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of such as 1024x768. Raises ValueError."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and len(text) <= 16 and int(width) > 0 and int(height) > 0):
        raise ValueError(f"size={text[:32]!r}: give WIDTHxHEIGHT in pixels, such as 1024x768")
    return int(width), int(height)


def guided(setting: Setting, scale: float, weak: int | float | str | None, budgets: Sequence[int]) -> Setting:
    """`setting` with guidance of `scale` (1 is off), its second branch at the budget `weak`. Raises ValueError."""
    if scale == 1:
        return replace(setting, guided=False, weak_budget=None)
    weak_budget = resolve_budget(weak, budgets) if weak is not None else None
    return replace(setting, guided=True, weak_budget=weak_budget)
