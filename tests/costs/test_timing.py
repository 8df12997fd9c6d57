"""Wall-clock of what runs on a device."""

import time

import torch

from elit.costs.timing import timed


def test_a_run_is_timed_and_its_result_comes_back():
    result, seconds = timed(lambda: time.sleep(0.02) or 7, torch.device("cpu"))
    assert result == 7
    assert 0.02 <= seconds < 2
