"""Wall-clock of what runs on a device."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from elit.budgets import Budget
from elit.models.transformer import Transformer
from elit.models.windows import as_size

Result = TypeVar("Result")


def timed(run: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """The result of `run` and its seconds; waits for the device before and after."""
    wait_for(device)
    start = time.perf_counter()
    result = run()
    wait_for(device)
    return result, time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given; a CPU has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def measure_ms(
    model: Transformer, *, sample_size: int | Sequence[int] | None = None, budget: Budget = None, batch_size: int = 1
) -> float:
    """Milliseconds of a forward of one sample: the median of five batches, over `batch_size`."""
    size = as_size(model.config.sample_size if sample_size is None else sample_size)
    x = torch.randn(batch_size, model.config.in_channels, *size, device=model.device, dtype=model.dtype)
    t = torch.full((batch_size,), 0.5, device=model.device)
    y = model.conditioning.example(batch_size).to(model.device)

    with torch.no_grad():
        seconds = [timed(lambda: model(x, t, y, budget), model.device)[1] for _ in range(6)]
    return 1e3 * statistics.median(seconds[1:]) / batch_size  # the first one warms up
