"""When a claim holds: the rule, fixed before any run."""

import statistics
from collections.abc import Sequence


def verdict(advantages: Sequence[float]) -> str:
    """advantages: one number a seed, positive where the claim is right.

    Holds: every seed positive and the mean more than 2 standard errors above 0; does not hold: the same below 0.
    Less than 3 seeds decide nothing.
    """
    if len(advantages) < 3:
        return "undecided"
    mean, error = statistics.mean(advantages), standard_error(advantages)
    if min(advantages) > 0 and mean > 2 * error:
        return "holds"
    if max(advantages) < 0 and mean < -2 * error:
        return "does not hold"
    return "undecided"


def standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def overall(verdicts: Sequence[str]) -> str:
    """A claim holds if all its parts do, and does not if one does not."""
    return next((answer for answer in ("does not hold", "undecided") if answer in verdicts), "holds")
