"""How pictures are made, as plain values: what `elit sample`, the text inside a picture, a link and a page share."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self, get_args

from elit.budgets import Schedule, parse_budget
from elit.flow.guidance import Guidance, make_guidance

GuidanceKind = Literal["none", "cfg", "ag", "ccfg"]
Solver = Literal["euler", "heun"]
Precision = Literal["float32", "bfloat16", "float16"]


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
