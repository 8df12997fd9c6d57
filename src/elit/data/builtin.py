"""Data sets with a name: scikit-learn's digits, Fashion-MNIST, folders of IDX files (yann.lecun.com/exdb/mnist)."""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from elit.config import DATA
from elit.data.images import ImageSet
from elit.files import read_lines

Split = Literal["train", "test"]

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = tuple(f"a handwritten {name}" for name in DIGITS)
CLASSES = tuple(map(str, range(10)))

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
FASHION_MNIST_HUB = "zalando-datasets/fashion_mnist"
FASHION_CLASSES = "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"


def named_images(name: str, *, split: Split = "train") -> ImageSet | None:
    """The data set of a name, None for any other. Raises ValueError where the set is not on this machine."""
    if name.startswith("idx:"):
        return idx_images(name.removeprefix("idx:"), split)
    if name == "fashion-mnist":
        return fashion_mnist(split)
    return {"digits": digits, "moving-digits": moving_digits}[name]() if name in DATA else None


def digits() -> ImageSet:
    """1,797 handwritten digits: images (1797, 1, 8, 8) float32 in [-1, 1], labels (1797,) int64."""
    from sklearn.datasets import load_digits  # takes seconds to import

    bunch = load_digits()
    images: Tensor = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 1
    return ImageSet(images, torch.tensor(bunch.target, dtype=torch.int64), CLASSES, CAPTIONS)


def moving_digits(
    frames: int = 4, canvas: tuple[int, int] = (8, 12), pixels: int = 2, clips_per_digit: int = 8, seed: int = 0
) -> ImageSet:
    """Clips of each digit crossing a larger canvas from one place to another: images (N, 1, frames, *canvas)."""
    still = digits()
    size, count = still.images.shape[-1], clips_per_digit * len(still)
    rows, columns = ((length - size) // pixels + 1 for length in canvas)  # places along each axis
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(rows * columns, (count, 1), generator=generator)
    last = (first + torch.randint(1, rows * columns, (count, 1), generator=generator)) % (rows * columns)
    start, end = (torch.stack((place // columns, place % columns), -1) for place in (first, last))  # (count, 1, 2)
    path = (start + (end - start) * torch.linspace(0, 1, frames)[:, None]).round().long() * pixels  # (count, frames, 2)
    clips, pictures = np.full((count, 1, frames, *canvas), -1, np.float32), still.images[:, 0].numpy()
    for i, places in enumerate(path.tolist()):
        for frame, (top, left) in enumerate(places):
            clips[i, 0, frame, top : top + size, left : left + size] = pictures[i % len(still)]
    return ImageSet(torch.from_numpy(clips), still.labels.repeat(clips_per_digit), CLASSES, CAPTIONS)


def fashion_mnist(split: Split = "train") -> ImageSet:
    """Zalando's Fashion-MNIST, of Debian's folder or the Hub: images (N, 1, 32, 32) uint8, labels of ten classes."""
    if FASHION_MNIST.is_dir():
        return idx_images(FASHION_MNIST, split, classes=FASHION_CLASSES)
    import datasets

    try:
        rows = datasets.load_dataset(FASHION_MNIST_HUB, split=split).with_format("numpy")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"data='fashion-mnist': not at hand; `apt-get install dataset-fashion-mnist` puts it in {FASHION_MNIST}, "
            f"or give a folder of its IDX files as idx:FOLDER (the Hub's {FASHION_MNIST_HUB}: {type(error).__name__})"
        ) from None
    return _padded(torch.from_numpy(rows["image"]), torch.from_numpy(rows["label"]), FASHION_CLASSES)


def idx_images(folder: str | Path, split: Split = "train", *, classes: tuple[str, ...] = ()) -> ImageSet:
    """images (N, 1, H, W) uint8, sides padded so that 8 divides them, and labels of IDX files. Raises ValueError."""
    folder, prefix = Path(folder), "train" if split == "train" else "t10k"
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte", axes=3)
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte", axes=1)
    if not classes and (names := folder / "classes.txt").is_file():
        classes = tuple(filter(None, map(str.strip, read_lines(names))))
    count = int(labels.max()) + 1 if len(labels) else 0
    classes = classes or tuple(map(str, range(count)))
    if len(images) != len(labels) or count > len(classes):
        found = f"{len(images)} pictures, {len(labels)} labels up to {count - 1} and {len(classes)} class names"
        raise ValueError(f"data='idx:{folder}': {found} do not fit each other")
    return _padded(images, labels, classes)


def read_idx(path: Path, *, axes: int) -> Tensor:
    """A uint8 tensor of `axes` axes from an IDX file, or its gzipped form. Raises ValueError naming what is wrong."""
    gzipped = path.with_name(f"{path.name}.gz")
    try:
        content = path.read_bytes() if path.is_file() else gzip.decompress(gzipped.read_bytes())
        shape = struct.unpack_from(f">{axes}I", content, 4)
        if content[:4] != bytes((0, 0, 8, axes)) or len(content) != 4 + 4 * axes + math.prod(shape):
            raise ValueError(f"not {axes} axes of bytes, or of another length than its header")
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"data: cannot read {str(path)!r} or its .gz: {reason}; get it again") from None
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape).copy())


def _padded(images: Tensor, labels: Tensor, classes: tuple[str, ...]) -> ImageSet:
    """images (N, h, w) uint8, labels (N,) -> the set, padded: 28 becomes 32, which patches and windows divide."""
    rows, columns = ((-length) % 8 for length in images.shape[1:])
    padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    captions = tuple(f"a photo of {'an' if name[:1].lower() in 'aeiou' else 'a'} {name}" for name in classes)
    return ImageSet(F.pad(images, padding)[:, None], labels.long(), classes, captions)
