"""Wall-clock of what runs on a device."""

import time
from collections.abc import Callable
from typing import TypeVar

import torch

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
