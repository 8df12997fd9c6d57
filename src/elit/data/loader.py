"""The samples of training: which ones make up a step, epoch after epoch, and a loader that outlives its processes."""

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from elit.compat import is_dead_worker
from elit.config import RunConfig

Batch = tuple[Tensor, Any]  # samples and conditions, which have `.to`
ROUNDS = 6
ATTEMPTS = 3  # loaders in a row that may die without giving one batch


class StepSampler(Sampler[list[int]]):
    """The micro-batches of one process, in order, from step `start` (and its micro-batch `part`) to the last step."""

    def __init__(self, length: int, config: RunConfig, *, rank: int = 0, world: int = 1, start: int = 0):
        parts = config.gradient_accumulation
        if not length:
            raise ValueError("data: holds no samples")
        if config.batch_size % (parts * world):
            valid = f"a multiple of {parts * world} ({world} processes × {parts} accumulated micro-batches)"
            raise ValueError(f"batch_size must be {valid}, got {config.batch_size}")
        self.length, self.config, self.rank, self.world = length, config, rank, world
        self.start, self.part, self.parts = start, 0, parts

    def __iter__(self) -> Iterator[list[int]]:
        first = self.part
        for step in range(self.start, self.config.steps):
            samples = self.samples(step)
            for part in range(first, self.parts):
                yield samples[self.rows(part)]
            first = 0

    def rows(self, part: int) -> slice:
        """The samples of this process's micro-batch `part` among those of a step."""
        micro = self.config.batch_size // (self.parts * self.world)
        first = (part * self.world + self.rank) * micro
        return slice(first, first + micro)

    def advance(self) -> None:
        """Starts one micro-batch later."""
        steps, self.part = divmod(self.part + 1, self.parts)
        self.start += steps

    def samples(self, step: int) -> list[int]:
        """The samples of a step's whole batch, over all processes."""
        return self.positions(step, self.length).tolist()

    def positions(self, step: int, length: int) -> np.ndarray:
        """A step's places in the endless row of permutations of range(length)."""
        positions = np.arange(step * self.config.batch_size, (step + 1) * self.config.batch_size)
        epochs, offsets = np.divmod(positions, length)
        seed = self.config.seed
        parts = [shuffled(offsets[epochs == each], length, seed, int(each)) for each in np.unique(epochs)]
        return np.concatenate(parts)


class BucketSampler(StepSampler):
    """Steps take samples of one of `buckets` each, drawn by (seed, step) as often as it has samples."""

    def __init__(self, buckets: Sequence[np.ndarray], config: RunConfig, *, rank: int = 0, world: int = 1):
        super().__init__(sum(map(len, buckets)), config, rank=rank, world=world)
        self.buckets = buckets

    def samples(self, step: int) -> list[int]:
        lengths = [len(bucket) for bucket in self.buckets]
        (number,) = random.Random(f"bucket/{self.config.seed}/{step}").choices(range(len(lengths)), lengths)
        return self.buckets[number][self.positions(step, lengths[number])].tolist()


def shuffled(positions: np.ndarray, length: int, seed: int, epoch: int) -> np.ndarray:
    """The entries at `positions` (B,) of a permutation of range(length), a function of (seed, epoch)."""

    def mixed(x: np.ndarray) -> np.ndarray:
        """splitmix64's finisher: every bit of the result depends on every bit of x (B,) uint64."""
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    source = random.Random(f"order/{seed}/{epoch}")
    keys = [np.uint64(source.getrandbits(64)) for _ in range(ROUNDS)]
    codes = positions.astype(np.uint64)
    outside = np.ones(len(codes), dtype=bool)
    while outside.any():
        left, right = codes[outside] >> half, codes[outside] & mask
        for key in keys:
            left, right = right, left ^ (mixed(right ^ key) & mask)
        codes[outside] = (left << half) | right
        outside = codes >= length
    return codes.astype(np.int64)


class Feed:
    """A sampler's micro-batches on the device; a dead loader is replaced. `waited`: seconds spent waiting for data."""

    def __init__(
        self, data: Dataset[Batch], sampler: StepSampler, workers: int, device: torch.device, say: Callable[[str], None]
    ):
        self.data, self.sampler, self.workers, self.device, self.say = data, sampler, workers, device, say
        self.waited = 0.0
        self._batches = self._start()

    def __next__(self) -> Batch:
        start = time.perf_counter()
        for left in reversed(range(ATTEMPTS)):
            try:
                images, y = next(self._batches)
                break
            except (RuntimeError, OSError, EOFError) as error:
                if not is_dead_worker(error):
                    raise
                if not left:
                    lost = f"data: loader processes died {ATTEMPTS} times in a row"
                    raise ChildProcessError(f"{lost}; give fewer workers or more memory, and resume") from None
                self.say("data: a loader process died; started a new loader at the same batch")
                self._batches = self._start()
        self.sampler.advance()
        self.waited += time.perf_counter() - start
        return images.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def _start(self) -> Iterator[Batch]:
        main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGCHLD) if main else None
        pinned = self.device.type != "cpu"
        settings = {"num_workers": self.workers, "pin_memory": pinned, "worker_init_fn": _ignore_ctrl_c}
        batches = iter(DataLoader(self.data, batch_sampler=self.sampler, collate_fn=tuple, **settings))
        if before is not None:
            # torch's handler would raise in the middle of a step; without it, waiting for the next batch finds out.
            signal.signal(signal.SIGCHLD, before)
        return batches


def _ignore_ctrl_c(worker: int) -> None:
    """A terminal sends it to workers too; the run finishes its step with them and saves a checkpoint."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
