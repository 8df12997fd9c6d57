"""Pictures to be scored: 8-bit, as the field scores them, read a few at a time wherever they come from.

B pictures, C = 1 or 3 channels; clips have frames T behind C.
"""

import hashlib
import json
import math
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from elit._version import __version__
from elit.data.builtin import named_images
from elit.data.images import ImageSet
from elit.data.reader import centre_crop
from elit.data.source import open_source
from elit.evaluate import EvaluationWarning
from elit.files import replacing
from elit.sampling.pictures import to_uint8


class Pictures(Protocol):
    """Pictures in an order that never changes."""

    def __len__(self) -> int: ...

    def read(self, first: int, stop: int) -> Tensor:
        """(B, C, H, W) or (B, C, T, H, W) uint8. Raises ValueError naming a picture that cannot be used."""
        ...

    def labels(self, first: int, stop: int) -> Tensor | None:
        """(B,) int64, the classes they show or were made for; None where that is not known."""
        ...

    def describe(self) -> dict[str, Any]:
        """Where they come from, as JSON."""
        ...

    def stamp(self) -> str:
        """Changes where the pictures may have; what was kept of them is then not used."""
        ...


class MemoryPictures:
    """A data set in memory."""

    def __init__(self, data: ImageSet, name: str):
        self.pixels = data.images if data.images.dtype == torch.uint8 else to_uint8(data.images)
        self.class_labels, self.name = data.labels, name

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, first: int, stop: int) -> Tensor:
        return self.pixels[first:stop]

    def labels(self, first: int, stop: int) -> Tensor:
        return self.class_labels[first:stop]

    def describe(self) -> dict[str, Any]:
        return {"kind": "data", "name": self.name}

    def stamp(self) -> str:
        return __version__


class ArrayPictures:
    """arr_0 of an npz, as the ADM evaluator has it: (N, H, W, 3) uint8, clips (N, T, H, W, 3); labels in arr_1.

    Mapped into memory, unless it was compressed. Raises ValueError where it is no such file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.array, self.class_labels = array_in(path, "arr_0"), None
        if self.array.dtype != np.uint8 or self.array.ndim not in (4, 5) or self.array.shape[-1] not in (1, 3):
            raise ValueError(
                f"{str(path)!r}: arr_0 is {self.array.dtype} {self.array.shape}; expected uint8 pictures (N, H, W, 3)"
            )
        if "arr_1" in keys_of(path):
            labels = array_in(path, "arr_1")
            if labels.shape == self.array.shape[:1] and np.issubdtype(labels.dtype, np.integer):
                self.class_labels = torch.from_numpy(np.array(labels, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.array)

    def read(self, first: int, stop: int) -> Tensor:
        return torch.from_numpy(np.array(self.array[first:stop])).movedim(-1, 1).contiguous()

    def labels(self, first: int, stop: int) -> Tensor | None:
        return None if self.class_labels is None else self.class_labels[first:stop]

    def describe(self) -> dict[str, Any]:
        return {"kind": "npz", "name": self.path.name}

    def stamp(self) -> str:
        return stamp_of([self.path])


class FilePictures:
    """Images, or clips from animated ones, of a folder or of anything `datasets` reads here.

    image_size: ADM's centre crop to it; without, all must have one size.
    """

    def __init__(self, path: Path, image_size: int | None = None):
        self.path, self.image_size = path, image_size
        self.source = open_source(path, loose=True)
        self.size: tuple[int, ...] | None = None
        self.warned = False

    def __len__(self) -> int:
        return len(self.source)

    def read(self, first: int, stop: int) -> Tensor:
        return torch.stack([self._picture(index) for index in range(first, stop)])

    def labels(self, first: int, stop: int) -> Tensor | None:
        if not self.source.classes:
            return None
        return torch.tensor(self.source.labels[first:stop])

    def describe(self) -> dict[str, Any]:
        return {"kind": "files", "name": self.path.name, "image_size": self.image_size}

    def stamp(self) -> str:
        return self.source.identity()["stamp"]

    def _picture(self, index: int) -> Tensor:
        frames = [self._frame(frame) for frame in self.source.read(index, None)]
        if not self.warned and self.source.info(index).mode in ("L", "LA", "1"):
            line = f"{self.source.names[index]!r} is grey: repeated in three channels, as are all others like it"
            warnings.warn(line, EvaluationWarning, stacklevel=2)
            self.warned = True
        picture = frames[0] if len(frames) == 1 else torch.stack(frames, 1)
        self.size = self.size or tuple(picture.shape)
        if tuple(picture.shape) != self.size:
            raise ValueError(
                f"picture {self.source.names[index]!r} is {_size(picture.shape)}, others are {_size(self.size)}; "
                "make them one size, or give image_size"
            )
        return picture

    def _frame(self, image: Image.Image) -> Tensor:
        if self.image_size is not None:
            return to_uint8(centre_crop(image, self.image_size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class First:
    """The first `count` of other pictures. Raises ValueError where there are fewer."""

    def __init__(self, pictures: Pictures, count: int):
        if count > len(pictures):
            raise ValueError(f"count={count}: there are {len(pictures)} pictures")
        self.pictures, self.count = pictures, count
        self.read, self.labels, self.describe, self.stamp = (
            pictures.read,
            pictures.labels,
            pictures.describe,
            pictures.stamp,
        )

    def __len__(self) -> int:
        return self.count


def open_pictures(path: Path, image_size: int | None = None) -> Pictures:
    """The pictures at `path`: a data set's name (elit.data.builtin.NAMES), of which the test split; an npz, a folder of
    images, or what `datasets` reads.

    Raises ValueError where there are fewer than 2.
    """
    pictures: Pictures
    named = None if path.exists() else named_images(str(path), split="test")
    if named is not None:
        pictures = MemoryPictures(named, str(path))
    elif path.suffix == ".npz":
        pictures = ArrayPictures(path)
    else:
        pictures = FilePictures(path, image_size)
    if len(pictures) < 2:
        raise ValueError(f"pictures={str(path)!r}: {len(pictures)} picture; give at least 2")
    return pictures


def as_samples(pictures: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1], what detectors take."""
    return pictures.float() / 127.5 - 1


def write_npz(pictures: Pictures, path: Path, *, count: int | None = None, chunk: int = 64) -> None:
    """The ADM evaluator's format, written a chunk at a time: arr_0 (N, H, W, 3) uint8, labels in arr_1."""
    count = len(pictures) if count is None else count
    _, _, *size = pictures.read(0, 1).shape
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        # Entries of one date: the same pictures give the same file.
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *size, 3)}
            np.lib.format.write_array_header_1_0(file, header)
            for first in range(0, count, chunk):
                part = pictures.read(first, min(first + chunk, count)).movedim(1, -1)
                file.write(part.expand(*part.shape[:-1], 3).contiguous().numpy().tobytes())
        labels = pictures.labels(0, count)
        if labels is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
                np.lib.format.write_array(file, labels.numpy())


def keys_of(path: Path) -> list[str]:
    """The arrays of an npz. Raises ValueError where it cannot be read."""
    if not path.is_file():
        raise ValueError(f"{str(path)!r}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{str(path)!r}: not a readable npz ({error})") from None


def array_in(path: Path, key: str) -> np.ndarray:
    """One array of an npz; mapped into memory where the file is not compressed. Raises ValueError."""
    if key not in keys_of(path):
        raise ValueError(f"{str(path)!r}: no {key} among its keys {', '.join(keys_of(path))}")
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.getinfo(f"{key}.npy")
            with archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(file)
                header = file.tell()
        if entry.compress_type != zipfile.ZIP_STORED or fortran or dtype.hasobject or not math.prod(shape):
            with np.load(path) as arrays:
                return arrays[key]
        with path.open("rb") as raw:  # the entry's own header: 30 bytes, a name and an extra field
            raw.seek(entry.header_offset + 26)
            name, extra = (int.from_bytes(raw.read(2), "little") for _ in range(2))
        return np.memmap(path, dtype, "r", entry.header_offset + 30 + name + extra + header, shape)
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"{str(path)!r}: its {key} cannot be read ({' '.join(str(error).split())})") from None


def stamp_of(paths: Sequence[Path]) -> str:
    """Of the names, sizes and times of change of files."""
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def _size(shape: Sequence[int]) -> str:
    frames = f"{shape[1]} frames of " if len(shape) == 4 else ""
    return f"{frames}{shape[-1]}×{shape[-2]}"
