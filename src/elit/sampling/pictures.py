"""Pictures and clips as the bytes of a file, with a text inside: the record of how they were made.

.png                a tEXt chunk named "elit"
.jpg, .gif          the comment
.webp               EXIF's ImageDescription
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from torch import Tensor

from elit.config import require
from elit.files import Json, replacing, write_folder

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".gif": "GIF"}
MOVING = (".gif", ".webp")
FRAMES_PER_SECOND = 4
KEYWORD = "elit"
DESCRIPTION = 0x010E  # of EXIF
LONGEST = 65000  # a JPEG's comment holds two bytes less than 64 KiB


def encode_picture(frames: Sequence[Image.Image], suffix: str, text: str = "") -> bytes:
    """One picture, or the frames of a looping clip (.gif, .webp), as a file of that suffix with `text` inside.

    .webp is without loss; .jpg has quality 95. Raises ValueError for a text that is too long or not ASCII.
    """
    if not text.isascii() or len(text) > LONGEST:
        raise ValueError(f"text: {len(text)} characters; a picture holds at most {LONGEST}, of ASCII")
    first, *rest = frames
    kind = FORMATS[suffix.lower()]
    options: Json = {}
    if rest:
        options = {"save_all": True, "append_images": rest, "loop": 0, "duration": round(1000 / FRAMES_PER_SECOND)}
    if kind == "JPEG":
        options |= {"quality": 95}
    elif kind == "WEBP":
        options |= {"lossless": True}
    if text and kind == "PNG":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text(KEYWORD, text)
        options |= {"pnginfo": chunks}
    elif text and kind == "WEBP":
        exif = Image.Exif()
        exif[DESCRIPTION] = text
        options |= {"exif": exif}
    elif text:
        options |= {"comment": text.encode()}
    file = io.BytesIO()
    first.save(file, format=kind, **options)
    return file.getvalue()


def read_text(path: Path) -> str | None:
    """The text that `encode_picture` put into a file; None where there is none. Looks at no pixels.

    Raises ValueError where the file is missing or no picture.
    """
    try:
        with Image.open(path, formats=sorted(set(FORMATS.values()))) as image:
            if image.format == "PNG":
                text = image.info.get(KEYWORD)
            elif image.format == "WEBP":
                text = image.getexif().get(DESCRIPTION)
            else:
                text = image.info.get("comment")
    except FileNotFoundError:
        raise ValueError(f"{str(path)!r}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{str(path)!r}: not a picture that can be read ({' '.join(str(error).split())})") from None
    if isinstance(text, bytes):
        text = text.decode("ascii", errors="replace")
    return text if isinstance(text, str) and text else None


def as_pictures(samples: Tensor) -> Tensor:
    """Images as they are; clips (B, C, T, H, W) as strips of their frames, (B, C, H, T·W + gaps)."""
    if samples.ndim == 4:
        return samples
    return torch.cat([F.pad(frame, (0, 1), value=1.0) for frame in samples.unbind(2)], -1)[..., :-1]


def image_grid(images: Tensor, columns: int, *, scale: int = 1, gap: int = 2) -> Image.Image:
    """Images (B, C, H, W) in [-1, 1], C = 1 or 3, as one picture, `columns` a row, white between."""
    pixels = to_uint8(images).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    count, _, height, width = pixels.shape
    rows = math.ceil(count / columns)
    sheet = torch.full((3, rows * (height + gap) - gap, columns * (width + gap) - gap), 255, dtype=torch.uint8)
    for i in range(count):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[:, top : top + height, left : left + width] = pixels[i]
    return Image.fromarray(sheet.permute(1, 2, 0).numpy())


def from_pictures(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as (B, 3, H, W) in [-1, 1], of which `to_uint8` makes the same pixels again."""
    arrays = [torch.from_numpy(np.array(picture.convert("RGB"))) for picture in pictures]
    return torch.stack(arrays).movedim(-1, 1).float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] float -> 0 to 255, on the CPU."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def save_frames(frames: Sequence[Image.Image], path: Path, text: str = "") -> None:
    """Writes one picture, or a looping GIF or WebP, in the format of the suffix and with `text` inside."""
    content = encode_picture(frames, path.suffix, text)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def output_kind(out: Path, *, pictures: bool, clips: bool = False) -> str:
    """ "grid" for a picture, "animation" for a .gif or .webp of clips, "array" for a .npz, "folder" for no suffix.

    pictures: the samples are pixels; otherwise only an array can hold them. clips: they have frames.
    Raises ValueError for what cannot be written.
    """
    suffix = out.suffix.lower()
    kinds = dict.fromkeys(FORMATS, "grid") | {".npz": "array", "": "folder"}
    if clips:
        kinds |= dict.fromkeys(MOVING, "animation")
    require(suffix in kinds, "out", str(out), f"a folder, or end in one of {', '.join(filter(None, kinds))}")
    latents = kinds[suffix] != "array" and not pictures
    require(not latents, "out", str(out), "a .npz, or the vae be given: the samples are latents, no pictures")
    return kinds[suffix]


def is_sample(name: str) -> bool:
    """True for the name of a separate file that `write_samples` writes."""
    return re.fullmatch(r"\d{6,}\.(png|gif)", name) is not None


def write_samples(
    samples: Tensor,
    out: Path,
    *,
    pictures: bool,
    single: bool = False,
    describe: Callable[[int | None], str] = lambda row: "",
) -> None:
    """Images (B, C, H, W) or clips (B, C, T, H, W) as a grid, an animation, an array or separate files.

    single: one sample as it is, not on a sheet. describe: the text inside a picture of all samples (None) or of one row
    of them; an array has none.
    """
    kind = output_kind(out, pictures=pictures, clips=samples.ndim == 5)
    if kind == "folder":

        def write(folder: Path) -> None:
            for row, sample in enumerate(samples):
                path = folder / f"{row:06d}{'.gif' if samples.ndim == 5 else '.png'}"
                save_frames(single_frames(sample, path.suffix), path, describe(row))

        write_folder(out, write)  # in the place of what is there: no stale picture is left
    elif kind == "array":
        array = samples.float().cpu().numpy()
        if pictures:
            array = to_uint8(samples).movedim(1, -1).expand(*[-1] * (samples.ndim - 1), 3).numpy()
        with replacing(out) as temporary, temporary.open("wb") as file:
            np.savez(file, array)
    else:
        frames = single_frames(samples[0], out.suffix) if single else sheet_frames(samples, out.suffix)
        save_frames(frames, out, describe(None))


def sheet_frames(samples: Tensor, suffix: str) -> list[Image.Image]:
    """All samples on one sheet, small ones enlarged; of clips a moving sheet, or for a still format their frames."""
    scale = max(1, 64 // samples.shape[-1])
    columns = math.ceil(len(samples) ** 0.5)
    if samples.ndim == 4:
        return [image_grid(samples, columns, scale=scale)]
    if suffix.lower() in MOVING:
        return [image_grid(frame, columns, scale=scale) for frame in samples.unbind(2)]
    return [image_grid(as_pictures(samples), 1, scale=scale)]


def single_frames(sample: Tensor, suffix: str) -> list[Image.Image]:
    """One image (C, H, W), or one clip (C, T, H, W): its frames, in a still format side by side."""
    if sample.ndim == 3 or suffix.lower() not in MOVING:
        return [image_grid(as_pictures(sample[None]), 1)]
    return [image_grid(frame[None], 1) for frame in sample.unbind(1)]
