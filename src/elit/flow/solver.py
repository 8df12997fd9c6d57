"""Solvers of dx/dt = v(x, t) from noise (t = 0) to data (t = 1), as generators: several may be evaluated together.

They yield (x, t, step), t a float, take the velocity there, a tensor like x, by `send`, and return the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

from elit.config import require
from elit.flow.path import shift_time

if TYPE_CHECKING:
    from torch import Tensor

Solution: TypeAlias = "Generator[tuple[Tensor, float, int], Tensor, Tensor]"


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """steps + 1 times from 0 to 1, even before `shift_time`. Raises ValueError for steps < 1 or shift <= 0."""
    require(steps >= 1, "steps", steps, "at least 1")
    require(0 < shift < float("inf"), "shift", shift, "above 0")
    return [shift_time(i / steps, shift) for i in range(steps + 1)]


def euler(x: Tensor, times: Sequence[float]) -> Solution:
    """First order, one evaluation a step; the paper's sampler with 40 steps."""
    for step, (t, t_next) in enumerate(pairwise(times)):
        x = x + (t_next - t) * (yield x, t, step)
    return x


def heun(x: Tensor, times: Sequence[float]) -> Solution:
    """Second order, two evaluations a step but one in the last: at t = 1 itself no network was trained."""
    last = len(times) - 2
    for step, (t, t_next) in enumerate(pairwise(times)):
        v = yield x, t, step
        if step < last:
            v = (v + (yield x + (t_next - t) * v, t_next, step)) / 2
        x = x + (t_next - t) * v
    return x


SOLVERS = {"euler": euler, "heun": heun}


def solve(solution: Solution, velocity: Callable[[Tensor, float, int], Tensor]) -> Tensor:
    """Runs a solver to its end: velocity(x, t, step) is that of x, all of it at the same t, a float."""
    try:
        place = next(solution)
        while True:
            place = solution.send(velocity(*place))
    except StopIteration as end:
        return end.value
