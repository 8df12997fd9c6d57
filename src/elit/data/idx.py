"""Pictures in IDX files, the format of MNIST and its kin: Fashion-MNIST, or any folder of the four files.

The format: two zero bytes, a type code (8 = unsigned byte), the number of axes, the length of each axis as a big-endian
32-bit integer, then the values (http://yann.lecun.com/exdb/mnist).
"""

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

from elit.data.images import ImageSet

Split = Literal["train", "test"]

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
FASHION_MNIST_HUB = "zalando-datasets/fashion_mnist"
FASHION_CLASSES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
PREFIX = {"train": "train", "test": "t10k"}
MULTIPLE = 8
"""Sides are padded to a multiple of this: 28 becomes 32, which patches of 2 and windows of 4 divide."""
UNSIGNED_BYTE = 8


def fashion_mnist(split: Split = "train") -> ImageSet:
    """Zalando's Fashion-MNIST: images (60000 or 10000, 1, 32, 32) uint8, labels int64 of ten classes.

    Read from Debian's folder, or else from the Hugging Face Hub (its cache, where there is no network).
    Raises ValueError where it is at neither.
    """
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
    return _image_set(torch.from_numpy(rows["image"]), torch.from_numpy(rows["label"]), FASHION_CLASSES)


def idx_images(folder: str | Path, split: Split = "train", *, classes: tuple[str, ...] | None = None) -> ImageSet:
    """images (N, 1, H, W) uint8, padded with 0 to sides that 8 divides, and labels of a folder of IDX files.

    The files are train-images-idx3-ubyte and train-labels-idx1-ubyte, or t10k-… for the test split, as they are or with
    .gz. classes: by default the lines of the folder's classes.txt, or else the numbers.
    Raises ValueError for a file that is missing, is no such file or ends too soon.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"data='idx:{folder}': no such folder")
    images = read_idx(_file(folder, f"{PREFIX[split]}-images-idx3-ubyte"), axes=3)
    labels = read_idx(_file(folder, f"{PREFIX[split]}-labels-idx1-ubyte"), axes=1)
    if len(images) != len(labels):
        raise ValueError(f"data='idx:{folder}': {len(images)} pictures but {len(labels)} labels in its {split} files")
    names = folder / "classes.txt"
    if classes is None and names.is_file():
        classes = tuple(line.strip() for line in names.read_text(encoding="utf-8").splitlines() if line.strip())
    count = int(labels.max()) + 1 if len(labels) else 0
    classes = classes or tuple(map(str, range(count)))
    if count > len(classes):
        raise ValueError(f"data='idx:{folder}': label {count - 1}, but only {len(classes)} class names")
    return _image_set(images, labels, classes)


def read_idx(path: Path, *, axes: int) -> Tensor:
    """A uint8 tensor of `axes` axes from an IDX file, gzipped or not. Raises ValueError naming what is wrong."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"data: {str(path)!r}: damaged or cut short ({error}); get it again") from None
    header = 4 + 4 * axes
    magic = bytes((0, 0, UNSIGNED_BYTE, axes))
    if len(content) < header or content[:4] != magic:
        starts = content[:4].hex() or "nothing"
        raise ValueError(
            f"data: {str(path)!r}: starts with {starts}, not with {magic.hex()}: no IDX file of {axes} axes of bytes"
        )
    shape = struct.unpack(f">{axes}I", content[4:header])
    if len(content) - header != math.prod(shape):
        size = "×".join(map(str, shape))
        raise ValueError(f"data: {str(path)!r}: has {len(content) - header} values, but says {size}; get it again")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())


def _file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise ValueError(f"data='idx:{folder}': no {name} or {name}.gz in it")


def _image_set(images: Tensor, labels: Tensor, classes: tuple[str, ...]) -> ImageSet:
    """images (N, h, w) uint8, labels (N,) -> the padded set."""
    rows, columns = ((-length) % MULTIPLE for length in images.shape[1:])
    padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    captions = tuple(f"a photo of {_article(name)} {name}" for name in classes)
    return ImageSet(F.pad(images, padding)[:, None], labels.long(), classes, captions)


def _article(name: str) -> str:
    return "an" if name[:1].lower() in "aeiou" else "a"
