"""The reader of pictures: what training, encoding and evaluation see of any file that Pillow reads.

A picture is upright 8-bit RGB: EXIF's orientation is applied, alpha composited on white, 16 bits and floats scaled.
Damaged metadata costs no picture, and only the frames that are asked for are decoded.
"""

import io
import itertools
import math
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple, TypeVar

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
STILLS = ("MPO", "TIFF")
"""Formats whose further pictures are no frames of a clip: previews, thumbnails, the other eye."""
ORIENTATION = 0x0112  # of EXIF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAX_RATIO = 16
"""A picture is cut to this many times the wanted side before it is resized."""


class ImageInfo(NamedTuple):
    """A picture's header: its size upright, Pillow's mode, and whether it has an alpha channel."""

    width: int
    height: int
    mode: str
    transparent: bool


def read_frames(content: bytes, count: int | None = 1) -> list[Image.Image]:
    """The first `count` frames, or for None all of an animation; a still has one.

    Raises whatever Pillow does, and ValueError for fewer frames or values without a known range.
    """
    return _despite_metadata(content, lambda image: _frames(image, count))


def read_info(content: bytes) -> ImageInfo:
    """What the header alone tells. Raises whatever Pillow does."""

    def info(image: Image.Image) -> ImageInfo:
        size = image.size
        if image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8):  # Pillow turns a TIFF by itself
            size = size[::-1]
        return ImageInfo(*size, image.mode, image.has_transparency_data)

    return _despite_metadata(content, info)


def centre_crop(image: Image.Image, size: int | tuple[int, int]) -> Tensor:
    """ADM's crop of an RGB picture, on which ImageNet figures are made: (3, height, width) float32 in [-1, 1].

    size: of both sides, or (height, width). Halved with a box filter while it is twice too large, then bicubic until it
    just covers the size, then the middle.
    """
    height, width = (size, size) if isinstance(size, int) else size
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    longest = (math.ceil(MAX_RATIO * side / scale) for side in (width, height))
    image = _middle(image, *map(min, image.size, longest))
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    pixels = np.asarray(_middle(image, width, height), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)


def _middle(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _frames(image: Image.Image, count: int | None) -> list[Image.Image]:
    frames: list[Image.Image] = []
    for number in itertools.count() if count is None else range(count):
        if number:
            try:
                if image.format in STILLS:
                    break
                image.seek(number)
            except EOFError:
                break
        image.load()
        frame, turn = _as_rgb(image), TURNS.get(_orientation(image) or 1)
        frames.append(frame if turn is None else frame.transpose(turn))
    if count is not None and len(frames) < count:
        raise ValueError(f"{len(frames)} frames, {count} wanted")
    return frames


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _as_bytes(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _as_bytes(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, 32 bits or floats as 8 bits.

    16 bits reach to 65535; the others to the first of 1 (floats alone), 255 and 65535 that holds all values.
    """
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    ranges = (65535,) if image.mode.startswith("I;16") else (255, 65535) if image.mode == "I" else (1, 255, 65535)
    top = next((top for top in ranges if high <= top), None)
    if top is None or not low >= 0:
        raise ValueError(f"values must be from 0 to {ranges[-1]}, got {low:g} to {high:g}")
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))


def _orientation(image: Image.Image) -> int | None:
    try:
        return Image.Image.getexif(image).get(ORIENTATION)  # a PNG's own method would decode it
    except Exception:
        return None


def _despite_metadata(content: bytes, read: Callable[[Image.Image], T]) -> T:
    """What `read` finds in the file, or, where it fails, in the file without its metadata."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return read(image)
    except Exception:
        plain = _without_metadata(content)
        if plain == content:
            raise
        with Image.open(io.BytesIO(plain)) as image:
            return read(image)


def _without_metadata(content: bytes) -> bytes:
    """A PNG without texts and damaged side chunks, a JPEG without application segments but EXIF; else as it is."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return _chunks(content)
    return _segments(content) if content.startswith(b"\xff\xd8") else content


def _chunks(content: bytes) -> bytes:
    parts, place = [content[:8]], 8
    while place + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        chunk = content[place : place + 12 + length]
        side = kind[:1].islower()
        whole = chunk[-4:] == zlib.crc32(chunk[4:-4]).to_bytes(4, "big")
        if not side or (whole and kind in (b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")):
            parts.append(chunk)
        place += 12 + length
    return b"".join(parts)


def _segments(content: bytes) -> bytes:
    parts, place = [content[:2]], 2
    while content[place : place + 1] == b"\xff" and content[place : place + 2] != b"\xff\xda":
        marker, length = content[place + 1], int.from_bytes(content[place + 2 : place + 4], "big")
        segment = content[place : place + 2 + length]
        # JFIF and Adobe's say how colours are stored.
        if marker not in (*range(0xE1, 0xEE), 0xEF, 0xFE) or segment[4:8] == b"Exif":
            parts.append(segment)
        place += 2 + length
    return b"".join((*parts, content[place:]))
