"""Pictures and clips as the bytes of a file, with a text inside: the record of how they were made."""

import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from elit._version import __version__
from elit.config import require
from elit.files import Json, replacing, write_folder
from elit.sampling.engine import Engine
from elit.sampling.settings import Sampling

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".gif": "GIF"}
MOVING = (".gif", ".webp")
FRAMES_PER_SECOND = 4
KEYWORD = "elit"
DESCRIPTION = 0x010E  # of EXIF
LONGEST = 65000  # a JPEG's comment holds two bytes less than 64 KiB


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The samples to make: of which classes or prompts, and how many."""

    labels: tuple[str, ...] = ()  # Classes, by number or name, in turn; default: all of the model's.
    prompts: tuple[str, ...] = ()  # Texts, in turn, for a model that takes text.
    text_encoder: str | None = None  # Hugging Face name or folder of its encoder; default: as saved.
    count: int | None = None  # How many images; default: one a label or prompt, at most 64.
    batch_size: int = 64  # Images at a time; changes an image by rounding at most.

    def __post_init__(self) -> None:
        for name in ("labels", "prompts"):
            texts = getattr(self, name)
            require(isinstance(texts, tuple) and all(isinstance(each, str) for each in texts), name, texts, "texts")
        require(isinstance(self.text_encoder, str | None), "text_encoder", self.text_encoder, "a name or a folder")
        for name, value in (("count", 1 if self.count is None else self.count), ("batch_size", self.batch_size)):
            require(type(value) is int and value >= 1, name, value, "at least 1")


@dataclass(frozen=True, kw_only=True)
class PictureRecord:
    """How a picture was made."""

    model: str  # its folder, or the name of a model in the box
    weights: str  # a digest
    sampling: Sampling
    subject: Subject
    row: int | None = None  # number of the one image that the picture shows; None: all of them
    made_with: dict[str, str] = field(default_factory=dict)  # versions and device, on which rounding depends

    def to_text(self) -> str:
        """JSON, ASCII."""
        content = {name: getattr(self, name) for name in ("model", "weights", "row", "made_with")}
        settings = {each.name: getattr(self.subject, each.name) for each in fields(Subject)} | self.sampling.to_dict()
        return json.dumps(content | {"settings": settings}, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> "PictureRecord":
        """Reads the text of a picture of any version. Raises ValueError where it is damaged."""
        try:
            content = json.loads(text)
            settings = {name: tuple(v) if isinstance(v, list) else v for name, v in content.pop("settings").items()}
            subject: Json = {each.name: settings[each.name] for each in fields(Subject) if each.name in settings}
            known = {*subject, *Sampling().to_dict(), "scale", "guidance_budget", "guidance_interval"}
            require(set(settings) <= known, "settings", sorted(set(settings) - known), "known")
            record = cls(sampling=Sampling.from_dict(settings), subject=Subject(**subject), **content)
            strings = [record.model, record.weights, *record.made_with, *record.made_with.values()]
            row = record.row is None or (type(record.row) is int and record.row >= 0)
            if not all(isinstance(each, str) for each in strings) or not row:
                raise ValueError("model, weights, row or made_with is of the wrong kind")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"the settings in it are damaged: {' '.join(str(error).split())[:160]}") from None
        return record


@torch.no_grad()
def make_record(engine: Engine, sampling: Sampling, subject: Subject) -> PictureRecord:
    """The record of samples that an engine makes; `weights` covers the first weights of every tensor."""
    network, device = engine.network, engine.network.device
    digest = hashlib.sha256(f"{type(network).__name__} {network.dtype}".encode())
    for name, value in sorted(network.state_dict().items()):
        first = value.flatten()[:64].float().cpu()
        digest.update(f"{name} {tuple(value.shape)}".encode() + first.numpy().tobytes())
    made_with = {"elit": __version__, "torch": torch.__version__, "device": device.type}
    if device.type == "cuda":
        made_with["device"] = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        made_with["threads"] = str(torch.get_num_threads())
    if getattr(engine, "compile", False):
        made_with["compile"] = "yes"
    weights = digest.hexdigest()[:16]
    return PictureRecord(model=engine.name, weights=weights, sampling=sampling, subject=subject, made_with=made_with)


def encode_picture(frames: Sequence[Image.Image], suffix: str, text: str = "") -> bytes:
    """A picture, or frames of a looping clip (.gif, .webp), as a file with `text` (ASCII) inside. Raises ValueError."""
    if not text.isascii() or len(text) > LONGEST:
        raise ValueError(f"text: {len(text)} characters; a picture holds at most {LONGEST}, of ASCII")
    first, *rest = frames
    kind = FORMATS[suffix.lower()]
    options: Json = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    if rest:
        options |= {"save_all": True, "append_images": rest, "loop": 0, "duration": round(1000 / FRAMES_PER_SECOND)}
    if text and kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text(KEYWORD, text)
    elif text and kind == "WEBP":
        options["exif"] = Image.Exif()
        options["exif"][DESCRIPTION] = text
    elif text:
        options["comment"] = text.encode()
    file = io.BytesIO()
    first.save(file, format=kind, **options)
    return file.getvalue()


def read_text(path: Path) -> str | None:
    """The text that `encode_picture` put into a file; None where there is none. Raises ValueError for no picture."""
    try:
        with Image.open(path, formats=sorted(set(FORMATS.values()))) as image:
            if image.format == "WEBP":
                text = image.getexif().get(DESCRIPTION)
            else:
                text = image.info.get(KEYWORD if image.format == "PNG" else "comment")
    except FileNotFoundError:
        raise ValueError(f"{str(path)!r}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{str(path)!r}: not a picture that can be read ({' '.join(str(error).split())})") from None
    text = text.decode("ascii", errors="replace") if isinstance(text, bytes) else text
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


def label_sheet(sheet: Image.Image, rows: Sequence[str], columns: Sequence[str] = ()) -> Image.Image:
    """A sheet of pictures with a text at the left of every row and above every column, cut to its width."""
    font, top = ImageFont.load_default(12), 20 if columns else 0
    left, width = 10 + round(max(map(font.getlength, rows))), sheet.width / max(1, len(columns))
    labelled = Image.new("RGB", (left + sheet.width, top + sheet.height), "white")
    labelled.paste(sheet, (left, top))
    draw = ImageDraw.Draw(labelled)
    for i, text in enumerate(rows):
        draw.text((left - 5, top + (i + 0.5) * sheet.height / len(rows)), text, "black", font, anchor="rm")
    for i, text in enumerate(columns):
        fits = next(text[:end] for end in range(len(text), -1, -1) if font.getlength(text[:end]) < width)
        draw.text((left + (i + 0.5) * width, top / 2), fits, "black", font, anchor="mm")
    return labelled


def sheet_frames(samples: Tensor, suffix: str, *, scale: int | None = None) -> list[Image.Image]:
    """Images or clips (B, C, T, H, W) on one sheet, moving where the format can; scale: default enlarges small ones."""
    scale = max(1, 64 // samples.shape[-1]) if scale is None else scale
    if samples.ndim == 5 and suffix.lower() not in MOVING:
        return [image_grid(as_pictures(samples), 1, scale=scale)]
    sheets = samples.unbind(2) if samples.ndim == 5 else [samples]
    return [image_grid(sheet, math.ceil(len(samples) ** 0.5), scale=scale) for sheet in sheets]


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


def output_kind(out: Path, *, pictures: bool) -> str:
    """ "picture", "array" (.npz) or "folder" (no suffix), of which latents need an array. Raises ValueError."""
    kinds = dict.fromkeys(FORMATS, "picture") | {".npz": "array", "": "folder"}
    kind = kinds.get(out.suffix.lower())
    require(kind is not None, "out", str(out), f"a folder, or end in one of {', '.join(filter(None, kinds))}")
    latents = kind != "array" and not pictures
    require(not latents, "out", str(out), "a .npz, or the vae be given: the samples are latents, no pictures")
    return str(kind)


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
    """Images (B, C, H, W) or clips (B, C, T, H, W) as a sheet, an array or separate files; single: not enlarged."""

    def write(folder: Path) -> None:
        for row, sample in enumerate(samples):
            path = folder / f"{row:06d}{'.gif' if samples.ndim == 5 else '.png'}"
            save_frames(sheet_frames(sample[None], path.suffix, scale=1), path, describe(row))

    kind = output_kind(out, pictures=pictures)
    if kind == "folder":
        write_folder(out, write)  # in the place of what is there: no stale picture is left
    elif kind == "array":
        array = samples.float().cpu().numpy()
        if pictures:
            array = to_uint8(samples).movedim(1, -1).expand(*[-1] * (samples.ndim - 1), 3).numpy()
        with replacing(out) as temporary, temporary.open("wb") as file:
            np.savez(file, array)
    else:
        save_frames(sheet_frames(samples, out.suffix, scale=1 if single else None), out, describe(None))
