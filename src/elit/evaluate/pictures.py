"""Pictures to be scored: 8-bit, as the field scores them, read a few at a time; clips have frames T behind channels."""

import hashlib
import json
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from elit._version import __version__
from elit.data.builtin import named_images
from elit.data.images import ImageSet, inspect_pictures
from elit.data.reader import centre_crop
from elit.data.source import open_source
from elit.evaluate import EvaluationWarning
from elit.evaluate.chunks import Recipe
from elit.files import replacing
from elit.sampling.pictures import to_uint8


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures in an order that never changes."""

    count: int
    read: Callable[[int, int], Tensor]
    """first, stop -> (B, C, H, W) or (B, C, T, H, W) uint8. Raises ValueError naming a picture that cannot be used."""
    labels: Tensor | None
    """(count or more,) int64, the classes they show or were made for; None where these are unknown."""
    recipe: Recipe  # their origin
    stamp: str = ""  # changes when their files do; features of the old ones are then not used


def open_pictures(path: Path, image_size: int | None = None, *, skip_unreadable: bool = False) -> Pictures:
    """The pictures of a data set's test split, an npz, a folder, .parquet or .tar; image_size: ADM's crop to it."""
    named = None if path.exists() else named_images(str(path), split="test")
    if named is not None:
        pictures = data_pictures(named, str(path))
    elif path.suffix == ".npz":
        pictures = array_pictures(path)
    else:
        pictures = file_pictures(path, image_size, skip_unreadable)
    if pictures.count < 2:
        raise ValueError(f"pictures={str(path)!r} must hold at least 2, got {pictures.count}")
    return pictures


def data_pictures(data: ImageSet, name: str) -> Pictures:
    images = data.images if data.images.dtype == torch.uint8 else to_uint8(data.images)
    return Pictures(
        count=len(images),
        read=lambda first, stop: images[first:stop],
        labels=data.labels,
        recipe={"kind": "data", "name": name},
        stamp=__version__,
    )


def array_pictures(path: Path) -> Pictures:
    """An npz as the ADM evaluator has it: arr_0 (N, H, W, 3) uint8, clips (N, T, H, W, 3); classes in arr_1."""
    names = keys_of(path)
    if "arr_0" not in names:
        raise ValueError(f"{str(path)!r} must have arr_0, got {', '.join(names)}")
    try:
        file = zipfile.ZipFile(path).open("arr_0.npy")  # noqa: SIM115
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ValueError(f"cannot read arr_0 of {str(path)!r}: {error}") from None
    if dtype != np.uint8 or len(shape) not in (4, 5) or shape[-1] not in (1, 3) or fortran:
        raise ValueError(f"arr_0 of {str(path)!r} must be uint8 pictures (N, H, W, 3), got {dtype} {shape}")
    begin, size = file.tell(), int(np.prod(shape[1:]))

    def read(first: int, stop: int) -> Tensor:
        file.seek(begin + first * size)
        rows = torch.frombuffer(bytearray(file.read((stop - first) * size)), dtype=torch.uint8)
        return rows.view(-1, *shape[1:]).movedim(-1, 1).contiguous()

    labels = array_in(path, "arr_1") if "arr_1" in names else np.empty(0)
    known = labels.shape == shape[:1] and np.issubdtype(labels.dtype, np.integer)
    stamp = json.dumps([(str(path), path.stat().st_size, path.stat().st_mtime_ns)])
    return Pictures(
        count=shape[0],
        read=read,
        labels=torch.from_numpy(labels.astype(np.int64)) if known else None,
        recipe={"kind": "npz", "name": path.name},
        stamp=hashlib.sha256(stamp.encode()).hexdigest(),
    )


def file_pictures(path: Path, image_size: int | None, skip_unreadable: bool) -> Pictures:
    """Images of a folder, a .parquet or a .tar; clips where all of them are animated, else the first frame of each."""
    source = open_source(path, loose=True)
    for line in source.not_taken():
        warnings.warn(line, EvaluationWarning, stacklevel=2)
    clips = all(map(source.moves, range(0, len(source), len(source) // 64 + 1)))  # a look at some of many
    frames = None if clips else 1
    found = inspect_pictures(source, frames) if skip_unreadable else [(0, 0)] * len(source)
    if faults := [fault for fault in found if isinstance(fault, str)]:
        warnings.warn(f"data: left out: {len(faults)} unreadable; {faults[0]}", EvaluationWarning, stacklevel=2)
        source = source.subset([row for row, each in enumerate(found) if not isinstance(each, str)])
    sizes = set[tuple[int, ...]]()

    def frame(image: Image.Image) -> Tensor:
        if image_size is not None:
            return to_uint8(centre_crop(image, image_size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def picture(index: int) -> Tensor:
        shown = [frame(image) for image in source.read(index, frames)]
        whole = shown[0] if len(shown) == 1 else torch.stack(shown, 1)
        sizes.add(tuple(whole.shape))
        if len(sizes) > 1:
            fault = f"{source.pictures[index].name!r}, since there are {sizes}"
            raise ValueError(f"cannot use picture {fault}: make them one size, or give image_size")
        return whole

    return Pictures(
        count=len(source),
        read=lambda first, stop: torch.stack([picture(index) for index in range(first, stop)]),
        labels=torch.tensor(source.true_labels) if source.classes else None,
        recipe={"kind": "files", "name": path.name, "image_size": image_size},
        stamp=f"{source.identity['stamp']}{' '.join(faults)}",
    )


def as_samples(pictures: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1], as detectors take them."""
    return pictures.float() / 127.5 - 1


def write_npz(pictures: Pictures, path: Path, *, chunk: int = 64) -> None:
    """Writes the ADM evaluator's format, a chunk at a time: arr_0 (N, H, W, 3) uint8, labels in arr_1."""
    count = pictures.count
    _, _, *size = pictures.read(0, 1).shape
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        # Entries of one date: the same pictures give the same file.
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *size, 3)}
            np.lib.format.write_array_header_1_0(file, header)
            for first in range(0, count, chunk):
                part = pictures.read(first, min(first + chunk, count)).movedim(1, -1)
                file.write(part.expand(*part.shape[:-1], 3).contiguous().numpy().tobytes())
        if pictures.labels is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
                np.lib.format.write_array(file, pictures.labels[:count].numpy())


def keys_of(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"cannot read {str(path)!r}: not an npz ({error})") from None


def array_in(path: Path, key: str) -> np.ndarray:
    try:
        with np.load(path) as arrays:
            return arrays[key]
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        raise ValueError(f"cannot read {key} of {str(path)!r}: {' '.join(str(error).split())}") from None
