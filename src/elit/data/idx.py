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


def idx_images(folder: str | Path, split: Split = "train", *, classes: tuple[str, ...] = ()) -> ImageSet:
    """images (N, 1, H, W) uint8, padded with 0 to sides that 8 divides, and labels of a folder of IDX files.

    The files are train-images-idx3-ubyte and train-labels-idx1-ubyte, or t10k-… for the test split, as they are or with
    .gz. classes: by default the lines of the folder's classes.txt, or else the numbers.
    Raises ValueError for a file that is missing, is no such file or ends too soon.
    """
    folder = Path(folder)
    images = read_idx(folder / f"{PREFIX[split]}-images-idx3-ubyte", axes=3)
    labels = read_idx(folder / f"{PREFIX[split]}-labels-idx1-ubyte", axes=1)
    if not classes and (names := folder / "classes.txt").is_file():
        classes = tuple(filter(None, map(str.strip, names.read_text(encoding="utf-8").splitlines())))
    count = int(labels.max()) + 1 if len(labels) else 0
    classes = classes or tuple(map(str, range(count)))
    if len(images) != len(labels) or count > len(classes):
        found = f"{len(images)} pictures, {len(labels)} labels up to {count - 1} and {len(classes)} class names"
        raise ValueError(f"data='idx:{folder}': {found} do not fit each other")
    return _image_set(images, labels, classes)


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


def _image_set(images: Tensor, labels: Tensor, classes: tuple[str, ...]) -> ImageSet:
    """images (N, h, w) uint8, labels (N,) -> the set, padded: 28 becomes 32, which patches and windows divide."""
    rows, columns = ((-length) % 8 for length in images.shape[1:])
    padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    captions = tuple(f"a photo of {'an' if name[:1].lower() in 'aeiou' else 'a'} {name}" for name in classes)
    return ImageSet(F.pad(images, padding)[:, None], labels.long(), classes, captions)
