"""Budgets: their forms, the draw of one in training, and schedules of them over a sampling run.

A network lists its valid budgets as `model.budgets`: latents kept per window, ascending, the last one full.
Users write a budget as
    None            all latents
    int             that many latents of every window
    float (0, 1]    that share of them, rounded to the nearest valid count
    str             "8" latents ("1" is one), "50%" or "0.5" a share of them, "100%" or "1.0" all; or a schedule over t
                    ("50%@0-0.5,100%@0.5-1": half of them while t < 0.5, then all)
Several budgets are `step_budgets` or `sample_budgets` of `elit.sample`; a network's forward takes one a sample.
"""

import math
import random
import re
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from numbers import Integral
from typing import TypeVar

T = TypeVar("T")
Budget = int | float | None
Schedule = Budget | str | Sequence[Budget] | Callable[[float], Budget]
TYPED = "latents per window (8), a share of them (50%), all (100%), or a schedule over t (50%@0-0.5,100%@0.5-1)"
ANY_COUNT = range(1, 1 << 31)  # Budgets to check a text against where no network is at hand.

budget_block: ContextVar[Schedule] = ContextVar("elit_budget", default=None)  # Set by `with elit.budget(...)`.


def resolve_budget(budget: Budget | str, budgets: Sequence[int]) -> int | None:
    """The latents kept per window, one of `budgets`; None for a baseline (`budgets` empty). Raises ValueError."""
    if isinstance(budget, str):
        budget = parse_budget(budget)
    if not budgets:
        if budget is not None:
            raise ValueError(f"budget must be None, since this model has no latent interface, got {budget!r}")
        return None
    if budget is None:
        return budgets[-1]
    step = budgets[0]  # budgets are multiples of the first
    if isinstance(budget, Integral):
        # Inequalities, not a look-up: under torch.compile the budget is then one dynamic dimension.
        if budgets[0] <= budget <= budgets[-1] and (step == 1 or budget % step == 0):
            return budget if type(budget) is int else int(budget)
    elif 0 < budget <= 1:
        return max(1, math.floor(budget * budgets[-1] / step + 0.5)) * step
    counts = f"{step} to {budgets[-1]}" + (f" in steps of {step}" if step > 1 else "")
    valid = f"a number of latents per window ({counts}), a share of them ('50%', in Python 0.5), or None for all"
    raise ValueError(f"budget must be {valid}, got {budget!r}")


def parse_budget(text: str) -> Budget:
    """A budget as typed: "8" latents per window, "50%" or "0.5" a share, "100%", "full" or "none" all."""
    text = text.strip().lower()
    if text in ("none", "full"):
        return None
    number = text.removesuffix("%").rstrip()
    try:
        if number == text:
            return float(number) if re.search("[^-+0-9]", number) else int(number)
        if 0 < (share := float(number) / 100) <= 1:
            return share
    except ValueError:
        pass
    raise ValueError(f"budget must be {TYPED}, got {text!r}")


def format_budget(budget: Budget) -> str:
    """The text that `parse_budget` reads as `budget`: "8", "50%", "100%" for None."""
    if isinstance(budget, int):
        return str(budget)
    return "100%" if budget is None else f"{100 * budget:.10g}%"


def format_schedule(text: str) -> str:
    """A schedule as text, with shares in percent: "0.5@0-0.5,1.0@0.5-1" is "50%@0-0.5,100%@0.5-1"."""
    return ",".join(f"{format_budget(budget)}@{low:g}-{high:g}" for budget, low, high in _parse_pieces(text))


def saved_schedule(text: str) -> str:
    """A schedule of any version's file, as `format_schedule` writes it: a bare 1 beside decimal shares was all."""
    if "%" not in text and re.search(r"\.\d*@", text):
        text = re.sub(r"(^|,)\s*1\s*@", r"\g<1>1.0@", text)
    return format_schedule(text)


def draw_budget(seed: int, step: int, budgets: Sequence[int]) -> int | None:
    """The budget of one training iteration, uniform over `budgets`; None for a baseline.

    It depends on (seed, step) alone: every rank and a resumed run draw the same. Paper section 3.
    """
    return random.Random(f"budget/{seed}/{step}").choice(list(budgets)) if budgets else None


def training_budgets(budgets: Sequence[int], low: int | None, high: int | None) -> tuple[int, ...]:
    """The budgets of a multi-budget run, drawn with equal chance: J_min to J_max, by default 1 to J."""
    if not budgets:
        if low is not None or high is not None:
            raise ValueError("budget_min and budget_max must be unset, since this model has no latent interface")
        return ()
    low, high = 1 if low is None else low, budgets[-1] if high is None else high
    if not 1 <= low <= high <= budgets[-1]:
        bounds = f"1 <= budget_min <= budget_max <= {budgets[-1]}"
        raise ValueError(f"budget_min and budget_max must satisfy {bounds}, got {low} and {high}")
    valid = [budget for budget in budgets if low <= budget <= high]
    if not valid:
        raise ValueError(f"cannot train at budgets from {low} to {high}: no budget of this model lies between them")
    return tuple(min(valid, key=lambda budget: abs(budget - number)) for number in range(low, high + 1))


def schedule_budgets(schedule: Schedule, times: Sequence[float], budgets: Sequence[int]) -> list[int | None]:
    """The budget of every sampling step; `times` are the t at which steps start, 0 = noise, 1 = data."""
    if isinstance(schedule, str) and "@" in schedule:
        pieces = _parse_pieces(schedule)
        # The piece is found with a tolerance: a step at t = 0.3 must not miss "…@0.3-1" by a rounding error.
        schedule = [next(budget for budget, _, high in pieces if t < high - 1e-9 or high == 1) for t in times]
    elif callable(schedule):
        schedule = [schedule(t) for t in times]
    if isinstance(schedule, str) or not isinstance(schedule, Sequence):
        return [resolve_budget(schedule, budgets)] * len(times)
    if len(schedule) != len(times):
        raise ValueError(f"step_budgets must be one a step, got {len(schedule)} for {len(times)} steps")
    return [resolve_budget(budget, budgets) for budget in schedule]


def is_list(value: object) -> bool:
    """True for several budgets: a sequence, or an array or tensor with one axis."""
    if value is None or isinstance(value, int | float | str):  # torch.compile traces numbers through here
        return False
    return isinstance(value, Sequence) or getattr(value, "ndim", 0) == 1


def budgets_of_samples(values: Sequence[Budget], count: int, budgets: Sequence[int], name: str) -> list[int | None]:
    """One valid budget a sample; `name` is the argument's, for the refusal of a list of another length."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if len(values) != count:
        raise ValueError(f"{name} must be one a sample, got {len(values)} for {count} samples")
    return [resolve_budget(value, budgets) for value in values]


def equal_parts(counts: Sequence[int | None]) -> list[int | None]:
    """The fewest budgets that, each for an equal part of the batch, are the same as one a sample."""
    for parts in range(1, len(counts)):
        length, rest = divmod(len(counts), parts)
        if not rest and all(count == counts[i - i % length] for i, count in enumerate(counts)):
            return list(counts[::length])
    return list(counts)


def evenly_spaced(values: Sequence[T], count: int) -> list[T]:
    """At most `count` of the values in their order, evenly spaced, the first and the last among them."""
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / max(count - 1, 1))] for i in range(count)]


def _parse_pieces(text: str) -> list[tuple[Budget, float, float]]:
    """(budget, from t, to t) of each piece of a schedule as text."""
    pieces = []
    for piece in text.split(","):
        budget, _, interval = piece.partition("@")
        low, _, high = interval.partition("-")
        try:
            pieces.append((parse_budget(budget), float(low), float(high)))
        except ValueError:
            raise ValueError(f"cannot read budget {text!r}: {piece!r} is not of the form BUDGET@LOW-HIGH") from None
    edges = [0.0] + [high for _, _, high in pieces]
    if [low for _, low, _ in pieces] != edges[:-1] or edges[-1] != 1 or edges != sorted(set(edges)):
        raise ValueError(f"budget must cover t from 0 to 1 in order, without gap or overlap, got {text!r}")
    return pieces
