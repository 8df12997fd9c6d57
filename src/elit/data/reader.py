"""Any file that Pillow reads, as upright 8-bit RGB: alpha on white, deep grey scaled, damaged metadata left out."""

import io
import itertools
import math
import struct
import zlib
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

T = TypeVar("T")
SUFFIXES = frozenset(
    (
        *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".avifs", ".gif", ".bmp", ".dib"),
        *(".tif", ".tiff", ".jp2", ".j2k", ".tga", ".ppm", ".pgm", ".pbm", ".pnm"),
    )
)
STILLS = ("MPO", "TIFF")  # Formats whose further pictures are no frames of a clip: previews, thumbnails, the other eye.
ORIENTATION = 0x0112  # of EXIF
TURNS = (None, None, 0, 3, 1, 5, 4, 6, 2)  # by orientation, Image.Transpose's numbers
MAX_RATIO = 16  # a picture is cut to this many times the wanted side before it is resized


def read_frames(content: bytes, count: int | None = 1) -> list[Image.Image]:
    """The first `count` frames, or for None all of an animation; a still has one. Raises ValueError for fewer."""

    def frames(image: Image.Image) -> list[Image.Image]:
        found: list[Image.Image] = []
        for number in itertools.count() if count is None else range(count):
            if number and image.format in STILLS:
                break
            try:
                image.seek(number)
            except EOFError:
                break
            image.load()
            frame, turn = _as_rgb(image), TURNS[_orientation(image)]
            found.append(frame if turn is None else frame.transpose(Image.Transpose(turn)))
        if count is not None and len(found) < count:
            raise ValueError(f"{len(found)} frames, {count} wanted")
        return found

    return _despite_metadata(content, frames)


def is_animation(content: bytes) -> bool:
    """True for one that its header says has frames, of which later ones may be damaged."""
    animated = lambda image: image.format not in STILLS and getattr(image, "is_animated", False)  # noqa: E731
    return _despite_metadata(content, animated)


def centre_crop(image: Image.Image, size: int | tuple[int, int]) -> Tensor:
    """ADM's crop of an RGB picture, on which ImageNet figures are made: (3, height, width) float32 in [-1, 1]."""

    def middle(image: Image.Image, width: int, height: int) -> Image.Image:
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))

    height, width = (size, size) if isinstance(size, int) else size
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    longest = (math.ceil(MAX_RATIO * side / scale) for side in (width, height))
    image = middle(image, *map(min, image.size, longest))
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    pixels = np.asarray(middle(image, width, height), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        # 16 bits reach to 65535; 32 and floats to the first of these that holds all values.
        tops = (65535,) if image.mode.startswith("I;16") else (255, 65535) if image.mode == "I" else (1, 255, 65535)
        values = np.asarray(image).astype(np.float64)
        top = next((top for top in tops if values.max() <= top), None)
        if top is None or not values.min() >= 0:
            raise ValueError(f"values must be from 0 to {tops[-1]}, got {values.min():g} to {values.max():g}")
        image = Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        turn = int(Image.Image.getexif(image)[ORIENTATION])  # a PNG's own method would decode it
        return turn if 1 <= turn <= 8 else 1
    except Exception:  # damaged EXIF fails in Pillow with any class: struct.error, TypeError, KeyError, …
        return 1


def _despite_metadata(content: bytes, read: Callable[[Image.Image], T]) -> T:
    """The result of `read` for the file, or, where it fails, for the file without its metadata."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return read(image)
    except Exception:  # so do other damaged metadata; a file that has none raises again
        plain = b"".join(_parts(content))
        if plain == content:
            raise
        with Image.open(io.BytesIO(plain)) as image:
            return read(image)


def _parts(content: bytes) -> list[bytes]:
    """A PNG without texts and damaged side chunks, a JPEG without application segments but EXIF; else as it is."""
    png, place, parts = content.startswith(b"\x89PNG\r\n\x1a\n"), 8, [content[:8]]
    while png and (head := content[place : place + 8])[7:]:
        length, kind = struct.unpack(">I4s", head)
        chunk = content[place : place + 12 + length]
        whole = chunk[-4:] == zlib.crc32(chunk[4:-4]).to_bytes(4, "big")
        if kind[:1].isupper() or (whole and kind in (b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")):
            parts.append(chunk)
        place += len(chunk)
    if content.startswith(b"\xff\xd8"):
        place, parts = 2, [content[:2]]
        while content[place : place + 1] == b"\xff" and content[place + 1 : place + 2] != b"\xda":
            segment = content[place : place + 2 + int.from_bytes(content[place + 2 : place + 4], "big")]
            # JFIF's and Adobe's, E0 and EE, define how colours are stored.
            if segment[1] not in (*range(0xE1, 0xEE), 0xEF, 0xFE) or segment[4:8] == b"Exif":
                parts.append(segment)
            place += len(segment)
    return [*parts, content[place:]]
