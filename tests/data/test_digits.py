"""The digits, and the same digits on the move."""

import torch

from elit.data.builtin import CAPTIONS, digits, moving_digits


def test_the_digits_are_the_real_ones_with_captions():
    data = digits()
    assert data.images.shape == (1797, 1, 8, 8)
    assert (data.images.min(), data.images.max()) == (-1, 1)
    assert data.captions[7] == CAPTIONS[7] == "a handwritten seven"
    assert data.classes[7] == "7"


def test_every_frame_shows_the_whole_digit_and_nothing_else():
    """Cut out where it lies, each frame is the still digit; on the way it moves in a straight line."""
    still, data = digits(), moving_digits(frames=4, canvas=(10, 14), pixels=1, clips_per_digit=2)
    assert data.images.shape == (2 * 1797, 1, 4, 10, 14)
    assert torch.equal(data.labels, still.labels.repeat(2))
    places = [(top, left) for top in range(3) for left in range(7)]
    for i in range(0, len(data), 97):
        digit, path = still.images[i % 1797, 0], []
        for frame in data.images[i, 0]:
            cut = [(frame[top : top + 8, left : left + 8], (top, left)) for top, left in places]
            path.append(next(place for part, place in cut if torch.equal(part, digit)))
            assert (frame == -1).sum() == 140 - 64 + (digit == -1).sum()
        for k, place in enumerate(path):
            exact = [a + (b - a) * k / 3 for a, b in zip(path[0], path[-1], strict=True)]
            assert all(abs(p - e) <= 1 for p, e in zip(place, exact, strict=True))
        assert path[0] != path[-1]
