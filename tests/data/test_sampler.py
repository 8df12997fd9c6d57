"""The order of a run: every sample once an epoch, whoever asks and whenever."""

import numpy as np
import pytest

from elit.config import RunConfig
from elit.data.loader import StepSampler, shuffled


def steps(length=10, parts=1, seed=0, **share):
    config = RunConfig(batch_size=4, gradient_accumulation=parts, steps=5, seed=seed)
    return list(StepSampler(length, config, **share))


def flat(parts):
    return [index for part in parts for index in part]


def test_every_epoch_shows_every_image_once_in_a_new_order():
    row = flat(steps())
    assert sorted(row[:10]) == sorted(row[10:]) == list(range(10))
    assert row[:10] != row[10:]
    assert row != flat(steps(seed=1))


def test_the_order_does_not_depend_on_processes_micro_batches_or_resuming():
    whole = steps()
    assert steps(start=3) == whole[3:]
    ranks = [steps(rank=rank, world=2, parts=2) for rank in (0, 1)]
    for step, images in enumerate(whole):
        micro = [ranks[rank][2 * step + part] for part in (0, 1) for rank in (0, 1)]
        assert flat(micro) == images
    sampler = StepSampler(10, RunConfig(batch_size=4, gradient_accumulation=2, steps=5))
    every = list(sampler)
    sampler.start, sampler.part = 2, 1
    assert list(sampler) == every[5:]


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"batch_size must be a multiple of 6 \(3 processes × 2 accumulated.*got 4"):
        steps(parts=2, world=3)
    with pytest.raises(ValueError, match="no samples"):
        steps(length=0)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_the_shuffle_is_a_permutation(length):
    order = shuffled(np.arange(length), length, seed=0, epoch=0)
    assert sorted(order.tolist()) == list(range(length))
    assert shuffled(np.array([length - 1]), length, 0, 0)[0] == order[-1]


def test_the_shuffle_is_even():
    """Over many epochs every sample comes first equally often (chi-square), and neighbours do not stay together."""
    length, epochs = 50, 10_000
    first = np.array([shuffled(np.array([0, 1]), length, 0, epoch) for epoch in range(epochs)])
    for column in (first[:, 0], (first[:, 1] - first[:, 0]) % length):
        counts = np.bincount(column, minlength=length)
        counts = counts[1:] if counts[0] == 0 else counts
        expected = epochs / len(counts)
        assert ((counts - expected) ** 2 / expected).sum() < 100  # 48 degrees of freedom: beyond 1 in 10,000
