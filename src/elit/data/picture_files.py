"""Pictures and clips as the bytes of a file, with a text inside that says how they were made.

.png                a tEXt chunk named "elit"
.jpg, .gif          the comment
.webp               EXIF's ImageDescription
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

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
    options: dict[str, Any] = {}
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
