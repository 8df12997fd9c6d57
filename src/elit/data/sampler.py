"""Which samples make up a training step: epoch after epoch, each in an order of its own, none held in memory."""

import random
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from elit.config import RunConfig

ROUNDS = 6


class StepSampler(Sampler[list[int]]):
    """The micro-batches of one process, in order, from step `start` (and its micro-batch `part`) to the last step.

    The order is one permutation an epoch, a function of (seed, epoch) alone; a step takes the next `batch_size`
    samples of that endless row, and each process and micro-batch its own equal slice of them. So the samples of a
    step depend neither on the number of processes nor on where the run was resumed.
    """

    def __init__(self, length: int, config: RunConfig, *, rank: int = 0, world: int = 1, start: int = 0):
        parts = config.gradient_accumulation
        if not length:
            raise ValueError("data: holds no samples")
        if config.batch_size % (parts * world):
            valid = f"a multiple of {parts * world} ({world} processes × {parts} accumulated micro-batches)"
            raise ValueError(f"batch_size must be {valid}, got {config.batch_size}")
        self.length, self.config, self.rank, self.world = length, config, rank, world
        self.start, self.part, self.parts = start, 0, parts

    def __len__(self) -> int:
        return (self.config.steps - self.start) * self.parts - self.part

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
        parts = [
            shuffled(offsets[epochs == epoch], length, self.config.seed, int(epoch)) for epoch in np.unique(epochs)
        ]
        return np.concatenate(parts)


class BucketSampler(StepSampler):
    """A `StepSampler` whose steps take samples of one bucket each, drawn by (seed, step).

    buckets: the samples of each. A bucket is drawn as often as it has samples.
    """

    def __init__(self, buckets: Sequence[np.ndarray], config: RunConfig, *, rank: int = 0, world: int = 1):
        super().__init__(sum(map(len, buckets)), config, rank=rank, world=world)
        self.buckets = buckets

    def samples(self, step: int) -> list[int]:
        lengths = [len(bucket) for bucket in self.buckets]
        (number,) = random.Random(f"bucket/{self.config.seed}/{step}").choices(range(len(lengths)), lengths)
        return self.buckets[number][self.positions(step, lengths[number])].tolist()


def shuffled(positions: np.ndarray, length: int, seed: int, epoch: int) -> np.ndarray:
    """The entries at `positions` (B,) of a permutation of range(length), a function of (seed, epoch).

    A Feistel network over the next power of 4, walked on while it leads outside: no list is made, so a position of a
    billion samples costs as much as one of a hundred.
    """
    half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    source = random.Random(f"order/{seed}/{epoch}")
    keys = [np.uint64(source.getrandbits(64)) for _ in range(ROUNDS)]
    codes = positions.astype(np.uint64)
    outside = np.ones(len(codes), dtype=bool)
    while outside.any():
        left, right = codes[outside] >> half, codes[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        codes[outside] = (left << half) | right
        outside = codes >= length
    return codes.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64's finisher: every bit of the result depends on every bit of x (B,) uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
