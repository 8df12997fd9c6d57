"""Solvers of dx/dt = v(x, t) from noise (t = 0) to data (t = 1). A solver is a function of a callable.

velocity(x, t, step) -> tensor like x; t is a float and `step` the index of the step it belongs to, so that a
budget can change from step to step.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from elit.arguments import real_number, shortened, whole_number
from elit.flow.path import shift_time

Velocity = Callable[[Tensor, float, int], Tensor]


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """steps + 1 times from 0 to 1, even before `shift_time`. Raises ValueError for steps < 1 or shift <= 0."""
    steps, shift = whole_number("steps", steps, 1), real_number("shift", shift, above=0)
    return [shift_time(i / steps, shift) for i in range(steps + 1)]


def euler(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """First order, one evaluation a step; the paper's sampler with 40 steps."""
    for step, (t, t_next) in enumerate(pairwise(times)):
        x = x + (t_next - t) * velocity(x, t, step)
    return x


def heun(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Second order, two evaluations a step but one in the last: at t = 1 itself no network was trained."""
    last = len(times) - 2
    for step, (t, t_next) in enumerate(pairwise(times)):
        v = velocity(x, t, step)
        if step < last:
            v = (v + velocity(x + (t_next - t) * v, t_next, step)) / 2
        x = x + (t_next - t) * v
    return x


SOLVERS = {"euler": euler, "heun": heun}


def get_solver(name: str) -> Callable[[Velocity, Tensor, Sequence[float]], Tensor]:
    if not isinstance(name, str) or name not in SOLVERS:
        raise ValueError(f"solver={shortened(name)}: give one of {', '.join(SOLVERS)}")
    return SOLVERS[name]
