"""Checks of what users hand in: each returns the plain value, or raises a ValueError of one line.

Numbers of numpy and tensors of one number count as Python's own. True and False are no numbers.
"""

import math
import operator
from collections.abc import Sequence
from contextlib import suppress
from typing import Any


def whole_number(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """`value` as an int between `least` and `most`, bounds included."""
    number = None
    if not _is_flag(value):
        with suppress(TypeError):
            number = operator.index(value)
    if number is None or (least is not None and number < least) or (most is not None and number > most):
        raise ValueError(f"{name}={shortened(value)}: give a whole number{_bounds(least, most)}")
    return number


def whole_numbers(name: str, value: Any, example: str, least: int = 1) -> tuple[int, ...]:
    """Several of them, from a sequence or an array with one axis; `example` shows what is meant."""
    value = value.tolist() if getattr(value, "ndim", None) == 1 else value
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise ValueError(f"{name}={shortened(value)}: give several whole numbers, such as {example}")
    try:
        return tuple(whole_number(name, each, least) for each in value)
    except ValueError:
        raise ValueError(
            f"{name}={shortened(value)}: give whole numbers of at least {least}, such as {example}"
        ) from None


def real_number(
    name: str, value: Any, *, least: float | None = None, above: float | None = None, most: float | None = None
) -> float:
    """`value` as a finite number; `least` and `most` are valid themselves, `above` is not."""
    number = None
    if not _is_flag(value) and not isinstance(value, str | bytes):
        with suppress(TypeError, ValueError, OverflowError, RuntimeError):
            number = float(value)
    fits = number is not None and math.isfinite(number)
    if not fits or _outside(number, least, above, most):
        bounds = f" above {above:g}" if above is not None and most is None else _bounds(least, most)
        bounds = f" above {above:g} and at most {most:g}" if above is not None and most is not None else bounds
        raise ValueError(f"{name}={shortened(value)}: give a number{bounds}")
    return number


def shortened(value: Any) -> str:
    """A value as an error message shows it: on one line, and no longer than that."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _outside(number: float, least: float | None, above: float | None, most: float | None) -> bool:
    return (
        (least is not None and number < least)
        or (above is not None and number <= above)
        or (most is not None and number > most)
    )


def _bounds(least: float | None, most: float | None) -> str:
    if least is not None and most is not None:
        return f" from {least} to {most}"
    return f" of at least {least}" if least is not None else "" if most is None else f" of at most {most}"


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
