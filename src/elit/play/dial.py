"""Where the page's controls stand, as plain values: checked, turned into settings, and written into a link."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlencode

from elit.budgets import resolve_budget, schedule_budgets
from elit.sampling.settings import SampleSettings

MOST_STEPS, MOST_SEED, MOST_SCALE, LONGEST_PROMPT = 250, 2**31 - 1, 30.0, 2000
GUIDANCES = ("none", "cfg", "ag", "ccfg")
MOST_PIECES = 3


@dataclass(frozen=True, kw_only=True)
class Dial:
    """All that a visitor sets. Raises ValueError, in one line, for what cannot be."""

    condition: str
    """A class by name or number, or a prompt."""
    seed: int = 0
    pieces: int = 1
    """Of the budget over t: 1 is the same budget throughout."""
    budgets: tuple[int, ...] = ()
    """Latents of every group in each of three pieces, of which the first `pieces` count; empty without an interface."""
    knots: tuple[float, float] = (0.33, 0.67)
    """Where the second and the third piece begin."""
    steps: int = 16
    guidance: str = "none"
    scale: float = 1.5
    guidance_budget: int = 1

    def __post_init__(self) -> None:
        if not self.condition.strip():
            raise ValueError("nothing to draw: choose a class or type a prompt")
        if len(self.condition) > LONGEST_PROMPT:
            raise ValueError(f"a prompt of {len(self.condition)} characters; give at most {LONGEST_PROMPT}")
        for name, low, high in (
            ("seed", 0, MOST_SEED),
            ("steps", 1, MOST_STEPS),
            ("scale", 0, MOST_SCALE),
            ("pieces", 1, MOST_PIECES),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name):g}: give {low} to {high:g}")
        if self.guidance not in GUIDANCES:
            raise ValueError(f"guidance={self.guidance!r}: give one of {', '.join(GUIDANCES)}")
        edges = (0.0, *self.knots[: self.pieces - 1], 1.0)
        if not all(a < b for a, b in itertools.pairwise(edges)):
            raise ValueError(f"knots at t = {', '.join(f'{t:g}' for t in edges[1:-1])}: they must rise between 0 and 1")

    @classmethod
    def from_controls(cls, values: Sequence[Any]) -> "Dial":
        """From the controls' values in the order of `CONTROLS`."""
        given = dict(zip(CONTROLS, values, strict=True))
        budgets = tuple(
            _whole("budget", given[name]) for name in ("budget", "second", "third") if given[name] is not None
        )
        return cls(
            condition=str(given["condition"] if given["condition"] is not None else ""),
            seed=_whole("seed", given["seed"]),
            pieces=_whole("pieces", given["pieces"]),
            budgets=budgets,
            knots=(_number("knot", given["knot"]), _number("knot", given["later_knot"])),
            steps=_whole("steps", given["steps"]),
            guidance=str(given["guidance"]),
            scale=_number("scale", given["scale"]),
            guidance_budget=_whole("guidance budget", given["guidance_budget"]),
        )

    def controls(self) -> list[Any]:
        """What `from_controls` takes."""
        budgets = [*self.budgets, None, None, None][:3]
        first = [self.condition, self.seed, budgets[0], self.pieces, *self.knots, *budgets[1:]]
        return [*first, self.steps, self.guidance, self.scale, self.guidance_budget]

    @property
    def budget(self) -> str:
        """As text: a number of latents, a schedule over t, or all."""
        if not self.budgets:
            return "full"
        if self.pieces == 1:
            return str(self.budgets[0])
        return ",".join(f"{num_latents}@{low:g}-{high:g}" for low, high, num_latents in self.spans())

    def spans(self) -> list[tuple[float, float, int]]:
        """The pieces of the budget over t: from, to, latents."""
        edges = (0.0, *self.knots[: self.pieces - 1], 1.0)
        return list(zip(edges[:-1], edges[1:], self.budgets[: self.pieces], strict=True))

    def settings(self, *, takes_text: bool, dtype: str = "float32") -> SampleSettings:
        """Of one picture, as `elit sample` takes them."""
        text = self.condition.strip()
        return SampleSettings.from_values(
            {
                "prompts" if takes_text else "labels": [text],
                "count": 1,
                "budget": self.budget,
                "steps": self.steps,
                "guidance": self.guidance,
                "scale": self.scale,
                "guidance_budget": str(self.guidance_budget),
                "seed": self.seed,
                "dtype": dtype,
            },
            "the page",
        )

    def query(self) -> str:
        """The part of a link behind the question mark; `from_query` reads it."""
        values = {"of": self.condition, "seed": self.seed, "budget": self.budget, "steps": self.steps}
        if self.guidance != "none":
            values |= {"guidance": self.guidance, "scale": f"{self.scale:g}"}
        if self.guidance in ("ag", "ccfg"):
            values |= {"guidance_budget": self.guidance_budget}
        return urlencode(values)

    def from_query(self, query: Mapping[str, str], counts: Sequence[int]) -> "Dial":
        """This dial with what a link says; what it does not say stays. Raises ValueError.

        counts: the network's valid budgets.
        """
        changes: dict[str, Any] = {}
        if "of" in query:
            changes["condition"] = query["of"]
        for name, kind in (("seed", _whole), ("steps", _whole), ("scale", _number), ("guidance_budget", _whole)):
            if name in query:
                changes[name] = kind(name, query[name])
        if "guidance" in query:
            changes["guidance"] = query["guidance"]
        if "budget" in query and counts:
            changes |= pieces_of(query["budget"], counts)
        return replace(self, **changes)


CONTROLS = (
    *("condition", "seed", "budget", "pieces", "knot", "later_knot", "second", "third"),
    *("steps", "guidance", "scale", "guidance_budget"),
)


def pieces_of(budget: str, counts: Sequence[int]) -> dict[str, Any]:
    """A budget as text, as fields of a `Dial`. Raises ValueError where it has more than three pieces."""
    if "@" not in budget:
        whole = resolve_budget(budget, counts) or 0
        return {"pieces": 1, "budgets": (whole,) * MOST_PIECES}
    ends = [piece.rpartition("-")[2] for piece in budget.split(",")]
    if len(ends) > MOST_PIECES:
        raise ValueError(f"budget={budget!r}: the page shows at most {MOST_PIECES} pieces")
    edges = [0.0, *(_number("budget", end) for end in ends)]
    values = schedule_budgets(budget, edges[:-1], counts)
    spare = MOST_PIECES - len(values)
    knots = [*edges[1:-1], *[0.33, 0.67][len(ends) - 1 :]]
    return {"pieces": len(values), "budgets": (*values, *values[-1:] * spare), "knots": (knots[0], knots[1])}


def default_dial(start: Mapping[str, Any], counts: Sequence[int]) -> Dial:
    """Where the controls stand at first, at all latents. start: `PageEngine.start`."""
    return Dial(**start, budgets=tuple(counts[-1:]) * MOST_PIECES)


def examples(dial: Dial, counts: Sequence[int], guidances: Sequence[str]) -> list[tuple[str, Dial]]:
    """Settings worth a look, with their names; each keeps the class or prompt and the seed of `dial`."""
    if not counts:
        return []
    low, full, plain = counts[0], counts[-1], replace(dial, guidance="none", pieces=1)
    quarter = max(low, full // 4 // low * low)
    half = max(low, full // 2 // low * low)
    named = [
        ("all latents", replace(plain, budgets=(full,) * MOST_PIECES)),
        ("a quarter", replace(plain, budgets=(quarter,) * MOST_PIECES)),
        ("the fewest", replace(plain, budgets=(low,) * MOST_PIECES)),
        ("half → all", replace(plain, pieces=2, budgets=(half, full, full), knots=(0.5, 0.67))),
    ]
    if "ccfg" in guidances:
        guided = replace(plain, guidance="ccfg", scale=2.0 if dial.guidance == "none" else dial.scale)
        named.append(("CCFG", replace(guided, budgets=(half,) * MOST_PIECES, guidance_budget=low)))
    return named


def _whole(name: str, value: Any) -> int:
    number = _number(name, value)
    if number != int(number):
        raise ValueError(f"{name}={value}: give a whole number")
    return int(number)


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r}: give a number") from None
    if not abs(number) <= 2**53:  # which neither infinity nor NaN is
        raise ValueError(f"{name}={value}: give a number of reasonable size")
    return number
