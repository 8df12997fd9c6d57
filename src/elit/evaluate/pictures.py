"""Pictures to be scored: 8-bit, as the field scores them, read a few at a time from any origin.

B pictures, C = 1 or 3 channels; clips have frames T behind C.
"""

import copy
import hashlib
import json
import os
import warnings
import zipfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Self

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
from elit.evaluate.recipe import Recipe
from elit.files import replacing
from elit.sampling.pictures import to_uint8


class Pictures(ABC):
    """Pictures in an order that never changes."""

    count: int

    def __len__(self) -> int:
        return self.count

    @abstractmethod
    def read(self, first: int, stop: int) -> Tensor:
        """(B, C, H, W) or (B, C, T, H, W) uint8. Raises ValueError naming a picture that cannot be used."""

    def labels(self, first: int, stop: int) -> Tensor | None:
        """(B,) int64, the classes they show or were made for; None where these are unknown."""
        return None

    @abstractmethod
    def describe(self) -> Recipe:
        """Their origin, for a recipe."""

    def stamp(self) -> str:
        """Changes when the files do; features of the old ones are then not used."""
        return ""

    def truncated(self, count: int) -> Self:
        """The first `count` of them. Raises ValueError where there are fewer."""
        if count > self.count:
            raise ValueError(f"count must be at most {self.count}, the number of pictures, got {count}")
        first = copy.copy(self)
        first.count = count
        return first


class ArrayPictures(Pictures):
    """A data set in memory, or an npz as the ADM evaluator has it: arr_0 (N, H, W, 3), clips (N, T, H, W, 3); arr_1."""

    def __init__(self, pixels: np.ndarray, labels: Tensor | None, origin: Recipe, stamp: str):
        self.pixels, self.class_labels, self.origin, self.changed = pixels, labels, origin, stamp
        self.count = len(pixels)

    @classmethod
    def of_data(cls, data: ImageSet, name: str) -> Self:
        images = data.images if data.images.dtype == torch.uint8 else to_uint8(data.images)
        return cls(images.movedim(1, -1).numpy(), data.labels, {"kind": "data", "name": name}, __version__)

    @classmethod
    def of_file(cls, path: Path) -> Self:
        """Mapped into memory, unless it is compressed. Raises ValueError for other arrays."""
        pixels, class_labels = array_in(path, "arr_0"), None
        if pixels.dtype != np.uint8 or pixels.ndim not in (4, 5) or pixels.shape[-1] not in (1, 3):
            raise ValueError(
                f"arr_0 of {str(path)!r} must be uint8 pictures (N, H, W, 3), got {pixels.dtype} {pixels.shape}"
            )
        if "arr_1" in keys_of(path):
            labels = array_in(path, "arr_1")
            if labels.shape == pixels.shape[:1] and np.issubdtype(labels.dtype, np.integer):
                class_labels = torch.from_numpy(np.array(labels, dtype=np.int64))
        stamp = json.dumps([(str(path), path.stat().st_size, path.stat().st_mtime_ns)])
        origin = {"kind": "npz", "name": path.name}
        return cls(pixels, class_labels, origin, hashlib.sha256(stamp.encode()).hexdigest())

    def read(self, first: int, stop: int) -> Tensor:
        return torch.from_numpy(np.array(self.pixels[first:stop])).movedim(-1, 1).contiguous()

    def labels(self, first: int, stop: int) -> Tensor | None:
        return None if self.class_labels is None else self.class_labels[first:stop]

    def describe(self) -> Recipe:
        return self.origin

    def stamp(self) -> str:
        return self.changed


class FilePictures(Pictures):
    """Images, or clips from animated ones, of a folder, a .parquet or a .tar.

    image_size: ADM's centre crop to it; without, all must have one size.
    """

    def __init__(self, path: Path, image_size: int | None = None):
        self.path, self.image_size = path, image_size
        self.source = open_source(path, loose=True)
        self.count = len(self.source)
        self.size: tuple[int, ...] | None = None
        self.warned = False

    def read(self, first: int, stop: int) -> Tensor:
        return torch.stack([self._picture(index) for index in range(first, stop)])

    def labels(self, first: int, stop: int) -> Tensor | None:
        return torch.tensor(self.source.true_labels[first:stop]) if self.source.classes else None

    def describe(self) -> Recipe:
        return {"kind": "files", "name": self.path.name, "image_size": self.image_size}

    def stamp(self) -> str:
        return str(self.source.identity["stamp"])

    def _picture(self, index: int) -> Tensor:
        name = self.source.pictures[index].name
        frames = [self._frame(image) for image in self.source.read(index, None)]
        if not self.warned and self.source.info(index).mode in ("L", "LA", "1"):
            line = f"{name!r} is grey: repeated in three channels, as are all others like it"
            warnings.warn(line, EvaluationWarning, stacklevel=2)
            self.warned = True
        picture = frames[0] if len(frames) == 1 else torch.stack(frames, 1)
        self.size = self.size or tuple(picture.shape)
        if tuple(picture.shape) != self.size:
            shapes = f"{tuple(picture.shape)}, others are {self.size}"
            raise ValueError(f"cannot use picture {name!r} of {shapes}: make them one size, or give image_size")
        return picture

    def _frame(self, image: Image.Image) -> Tensor:
        if self.image_size is not None:
            return to_uint8(centre_crop(image, self.image_size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def open_pictures(path: Path, image_size: int | None = None) -> Pictures:
    """The pictures at `path`: a data set's name (elit.data.builtin.NAMES), of which the test split; an npz, a folder of
    images, a .parquet or a .tar. Raises ValueError where there are fewer than 2."""
    pictures: Pictures
    named = None if path.exists() else named_images(str(path), split="test")
    if named is not None:
        pictures = ArrayPictures.of_data(named, str(path))
    elif path.suffix == ".npz":
        pictures = ArrayPictures.of_file(path)
    else:
        pictures = FilePictures(path, image_size)
    if len(pictures) < 2:
        raise ValueError(f"pictures={str(path)!r} must hold at least 2, got {len(pictures)}")
    return pictures


def as_samples(pictures: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1], as detectors take them."""
    return pictures.float() / 127.5 - 1


def write_npz(pictures: Pictures, path: Path, *, chunk: int = 64) -> None:
    """Writes the ADM evaluator's format, a chunk at a time: arr_0 (N, H, W, 3) uint8, labels in arr_1."""
    count = len(pictures)
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
    """Names of the arrays of an npz. Raises ValueError where it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"cannot read {str(path)!r}: not an npz ({error})") from None


def array_in(path: Path, key: str) -> np.ndarray:
    """One array of an npz, mapped into memory where the file is not compressed. Raises ValueError."""
    if key not in (keys := keys_of(path)):
        raise ValueError(f"{str(path)!r} must have {key}, got {', '.join(keys)}")
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.getinfo(f"{key}.npy")
        if entry.compress_type != zipfile.ZIP_STORED:
            with np.load(path) as arrays:
                return arrays[key]
        with path.open("rb") as file:  # the entry's own header: 30 bytes, a name and an extra field
            file.seek(entry.header_offset + 26)
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            file.seek(name + extra, os.SEEK_CUR)
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
            return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        raise ValueError(f"cannot read {key} of {str(path)!r}: {' '.join(str(error).split())}") from None
