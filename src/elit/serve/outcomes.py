"""What became of the requests of a run, simulated or measured, and what that comes to."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One request. Times are seconds from the start of the run."""

    arrival: float
    deadline: float
    finish: float | None = None
    """None where it was refused or failed."""
    status: int = 200
    """The HTTP status: 200, 429 or 503; 0 where there was no answer."""
    budget: int | None = None
    """Latents per group it was served with."""
    steps: int | None = None
    queue_ms: float | None = None
    compute_ms: float | None = None

    @property
    def met(self) -> bool:
        return self.finish is not None and self.finish <= self.deadline


def summarize(outcomes: Sequence[Outcome], quality: Callable[[Outcome], float] | None = None) -> dict[str, Any]:
    """Violations (refused, failed or late) as a share, latencies of the served in ms, mean budget, goodput.

    quality: of an answer, such as a sweep's metric at its budget; its mean is over what was served.
    """
    served = [each for each in outcomes if each.finish is not None]
    latency = sorted(1e3 * (each.finish - each.arrival) for each in served if each.finish is not None)
    span = max((each.finish or each.arrival for each in outcomes), default=0.0) - min(
        (each.arrival for each in outcomes), default=0.0
    )
    met = sum(each.met for each in outcomes)
    total = max(1, len(outcomes))
    summary: dict[str, Any] = {
        "requests": len(outcomes),
        "violations": 1 - met / total if outcomes else 0.0,
        "refused": sum(each.finish is None for each in outcomes) / total,
        "late": (len(served) - met) / total,
        "p50_ms": percentile(latency, 0.50),
        "p99_ms": percentile(latency, 0.99),
        "mean_budget": mean([each.budget for each in served if each.budget is not None]),
        "mean_steps": mean([each.steps for each in served if each.steps is not None]),
        "goodput": met / span if span > 0 else 0.0,
    }
    if quality:
        summary["mean_quality"] = mean([quality(each) for each in served])
    return summary


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """The least value that `share` of the ascending ones do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def over_time(
    outcomes: Sequence[Outcome], bins: int = 60, quality: Callable[[Outcome], float] | None = None
) -> list[dict[str, float | None]]:
    """Load, budget, latency and violations in even pieces of the run, by arrival. quality: as in `summarize`."""
    if not outcomes:
        return []
    end = max(each.arrival for each in outcomes)
    width = max(end / bins, 1e-9)
    rows = []
    for number in range(bins):
        here = [each for each in outcomes if number == min(bins - 1, int(each.arrival / width))]
        row = summarize(here, quality)
        rows.append(
            {
                "at": (number + 0.5) * width,
                "rate": len(here) / width,
                "budget": row["mean_budget"],
                "steps": row["mean_steps"],
                "p50_ms": row["p50_ms"],
                "violations": row["violations"],
            }
            | ({"quality": row["mean_quality"]} if quality else {})
        )
    return rows
