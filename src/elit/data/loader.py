"""A run's micro-batches, the seconds spent waiting for them, and a new loader where one of its processes has died."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from elit.compat import is_dead_worker
from elit.data.sampler import StepSampler

Batch = tuple[Tensor, Any]
"""Samples and conditions, which have `.to`."""
ATTEMPTS = 3  # loaders in a row that may die without giving one batch


class Feed:
    """`next(feed)` is (images, labels) of the sampler's next micro-batch, moved to the device.

    `waited` counts the seconds in which a step stood still for data. A loader whose process died, for want of memory
    maybe, is replaced by one that goes on at the same micro-batch; raises ChildProcessError where that does not help.
    """

    def __init__(
        self,
        data: Dataset[Batch],
        sampler: StepSampler,
        *,
        workers: int,
        device: torch.device,
        say: Callable[[str], None],
    ):
        self.data, self.sampler, self.workers, self.device, self.say = data, sampler, workers, device, say
        self.waited, self.died = 0.0, 0
        self._batches = self._start()

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                images, y = next(self._batches)
                break
            except (RuntimeError, OSError, EOFError) as error:
                if not is_dead_worker(error):
                    raise
                self.died += 1
                reason = (str(error) or type(error).__name__).splitlines()[0]
                if attempt == ATTEMPTS:
                    raise ChildProcessError(
                        f"data: loader processes died {ATTEMPTS} times in a row ({reason}); give fewer workers or more "
                        "memory, and resume"
                    ) from None
                self.say(f"data: {reason}; started a new loader at the same batch")
                self._batches = self._start()
        self.sampler.advance()
        self.waited += time.perf_counter() - start
        return images.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def _start(self) -> Iterator[Batch]:
        main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGCHLD) if main else None
        loader: DataLoader[Batch] = DataLoader(
            self.data,
            batch_sampler=self.sampler,
            num_workers=self.workers,
            collate_fn=tuple,
            pin_memory=self.device.type != "cpu",
            worker_init_fn=_ignore_ctrl_c,
        )
        batches = iter(loader)
        if before is not None:
            # torch's handler would raise in the middle of a step; without it, waiting for the next batch finds out.
            signal.signal(signal.SIGCHLD, before)
        return batches


def _ignore_ctrl_c(worker: int) -> None:
    """A terminal sends it to workers too; the run finishes its step with them and saves a checkpoint."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
