"""When requests arrive: even, bursty, or as a file says. Seconds from the start, ascending; a seed decides all.

The bursty shape is that of the Azure Functions trace in DiffServe's evaluation: a slow wave like that of a day, noise
that remembers, and bursts that rise within a second or two and fade; arrivals are Poisson inside each second.
"""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_ARRIVALS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One request of a trace."""

    at: float
    """Seconds from the start."""
    deadline_ms: float | None = None
    """None = the service's own."""
    quality: str = "auto"


def steady_rates(seconds: int, mean: float) -> list[float]:
    """The same rate in every second."""
    return [mean] * seconds


def bursty_rates(seconds: int, mean: float, seed: int = 0) -> list[float]:
    """Requests a second, one number a second, with `mean` over all; the highest is about twice that."""
    draw = random.Random(f"rates/{seed}")
    phase, noise = draw.uniform(0, 2 * math.pi), 0.0
    shape = []
    for second in range(seconds):
        noise = 0.8 * noise + draw.gauss(0, 0.08)
        wave = 0.35 * math.sin(phase + 2 * math.pi * second / max(seconds, 1))
        shape.append(max(0.1, 1 + wave + noise))
    for _ in range(max(1, seconds // 40)):
        start, height, fade = draw.randrange(seconds), draw.uniform(0.6, 1.2), draw.uniform(3, 8)
        for second in range(start, seconds):
            rise = min(1.0, (second - start + 1) / 2)
            shape[second] += height * rise * math.exp(-(second - start) / fade)
    scale = mean * seconds / sum(shape)
    return [scale * each for each in shape]


def arrivals(rates: Sequence[float], seed: int = 0, **request: Any) -> list[Arrival]:
    """Poisson inside each second. request: deadline_ms and quality of all. Raises ValueError for a negative rate."""
    if any(not (rate >= 0 and math.isfinite(rate)) for rate in rates):
        raise ValueError("rates: give requests a second, 0 or more")
    if sum(rates) > MOST_ARRIVALS:
        raise ValueError(f"rates: {sum(rates):.0f} requests in all; give at most {MOST_ARRIVALS}")
    draw = random.Random(f"arrivals/{seed}")
    times = []
    for second, rate in enumerate(rates):
        at = draw.expovariate(rate) if rate > 0 else 1.0
        while at < 1:
            times.append(second + at)
            at += draw.expovariate(rate)
    return [Arrival(at=at, **request) for at in times]


def write_trace(path: Path, trace: Sequence[Arrival]) -> None:
    """One JSON object a line."""
    from elit.files import write_text

    lines = [json.dumps({name: value for name, value in vars(each).items() if value is not None}) for each in trace]
    write_text(path, "\n".join(lines) + "\n")


def read_trace(path: Path) -> list[Arrival]:
    """The trace in a file of JSON lines. Raises ValueError naming the line that does not fit."""
    if not path.is_file():
        raise ValueError(f"trace={str(path)!r}: no such file; give one JSON object a line, such as {{'at': 0.25}}")
    trace: list[Arrival] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            arrival = Arrival(**json.loads(line))
            times = (arrival.at, 1.0 if arrival.deadline_ms is None else arrival.deadline_ms)
            if not all(type(time) in (int, float) and math.isfinite(time) and time >= 0 for time in times):
                raise ValueError("times are numbers, 0 or more")
            if arrival.quality not in ("auto", "low", "medium", "high"):
                raise ValueError("quality is auto, low, medium or high")
        except (TypeError, ValueError) as error:
            reason = "expected at, and where wanted deadline_ms and quality" if "Arrival" in str(error) else error
            raise ValueError(f"trace={str(path)!r}: line {number}: {reason}") from None
        trace.append(arrival)
    if not trace:
        raise ValueError(f"trace={str(path)!r}: no requests in it")
    if len(trace) > MOST_ARRIVALS:
        raise ValueError(f"trace={str(path)!r}: {len(trace)} requests; give at most {MOST_ARRIVALS}")
    return sorted(trace, key=lambda arrival: arrival.at)
