"""The digits that come with scikit-learn: 1,797 real handwritten ones of 8×8 pixels; still, or on the move."""

import torch
from torch import Tensor

from elit.data.images import ImageSet

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = tuple(f"a handwritten {name}" for name in NAMES)
CLASSES = tuple(map(str, range(10)))


def digits() -> ImageSet:
    """images (1797, 1, 8, 8) float32 in [-1, 1], labels (1797,) int64."""
    from sklearn.datasets import load_digits  # takes seconds to import

    bunch = load_digits()
    images: Tensor = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 1
    return ImageSet(images, torch.tensor(bunch.target, dtype=torch.int64), CLASSES, CAPTIONS)


def moving_digits(
    frames: int = 4, canvas: tuple[int, int] = (8, 12), pixels: int = 2, clips_per_digit: int = 8, seed: int = 0
) -> ImageSet:
    """Clips of each digit crossing a larger canvas in a straight line: images (N, 1, frames, *canvas).

    A clip starts in one place and ends in another, its digit as a whole on the canvas; places are multiples of
    `pixels`.
    """
    still = digits()
    size = still.images.shape[-1]
    count = clips_per_digit * len(still)
    rows, columns = ((length - size) // pixels + 1 for length in canvas)  # places along each axis
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(rows * columns, (count, 1), generator=generator)
    last = (first + torch.randint(1, rows * columns, (count, 1), generator=generator)) % (rows * columns)
    start, end = (torch.stack((place // columns, place % columns), -1) for place in (first, last))  # (count, 1, 2)
    path = (start + (end - start) * torch.linspace(0, 1, frames)[:, None]).round().long() * pixels  # (count, frames, 2)
    clips = torch.full((count, 1, frames, *canvas), -1.0)
    # A digit's pixels land at rows top + 0 … top + 7, and columns likewise.
    inside = torch.arange(size)
    row, column = path[..., :1] + inside, path[..., 1:] + inside  # (count, frames, size)
    clip, frame = torch.arange(count)[:, None, None, None], torch.arange(frames)[:, None, None]
    source = still.images[:, 0].repeat(clips_per_digit, 1, 1)[:, None]  # (count, 1, size, size)
    clips[clip, 0, frame, row[..., None], column[:, :, None]] = source.expand(-1, frames, -1, -1)
    return ImageSet(clips, still.labels.repeat(clips_per_digit), CLASSES, CAPTIONS)
