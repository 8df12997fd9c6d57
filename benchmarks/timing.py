"""Times that can be compared, the measured peak of a machine, and the memory of a step.

Compared cases take turns, round after round, there and back, and the median over rounds is taken: what slows the
machine for a moment slows all of them alike. Ratios of such times are what a benchmark may report.
"""

import statistics
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from elit.costs.timing import timed

Case = TypeVar("Case", bound=Hashable)
Run = Callable[[], object]


class Timing(NamedTuple):
    """Seconds of one case over the rounds."""

    median: float
    spread: float
    """(slowest − fastest) / median: how much the machine was disturbed."""


def take_turns(cases: Mapping[Case, Run], rounds: int, device: torch.device) -> dict[Case, Timing]:
    """The time of every case; a first round, which does not count, warms up."""
    seconds: dict[Case, list[float]] = {case: [] for case in cases}
    for round_ in range(rounds + 1):
        for case in list(cases)[:: -1 if round_ % 2 else 1]:
            _, elapsed = timed(cases[case], device)
            if round_:
                seconds[case].append(elapsed)
    medians = {case: statistics.median(values) for case, values in seconds.items()}
    return {case: Timing(medians[case], (max(v) - min(v)) / medians[case]) for case, v in seconds.items()}


def matrix_product(size: int, device: torch.device, dtype: torch.dtype) -> tuple[Run, int]:
    """A product of two square matrices, and its FLOPs: what utilisation is measured against."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2 * size**3


def peak_bytes(run: Run, device: torch.device) -> int:
    """The most memory that `run` holds at a time on top of what is there before it, as torch's allocator counts it.

    On a CPU from the profiler's record of every allocation: unlike the process's own size it is the same every time.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def difference(output: Tensor, expected: Tensor) -> float:
    """The largest difference of two outputs, over the largest value of the expected one."""
    return ((output - expected).abs().max() / expected.abs().max()).item()
