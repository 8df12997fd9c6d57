"""Images and clips in memory, images in a folder, and pictures written out."""

import json
import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, ImageSequence
from torch import Tensor

from elit.data.picture_files import FORMATS, MOVING, encode_picture
from elit.files import replacing, write_folder

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
METADATA = "metadata.jsonl"


class ImageData(Protocol):
    """What training needs of a data set; images are float32 in [-1, 1]."""

    classes: tuple[str, ...]
    captions: tuple[str, ...]
    """A prompt for each label."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of one image, (C, T, H, W) of a clip."""
        ...

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """images (B, C, H, W) and labels (B,) int64, the batch at once."""
        ...


class ImageSet:
    """Images held in memory: images (N, C, H, W) or (N, C, T, H, W), labels (N,) int64.

    Images are float32 in [-1, 1], or uint8, a quarter of the memory, of which batches are made as float32 in [-1, 1].
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: tuple[str, ...], captions: tuple[str, ...] = ()):
        self.images, self.labels = images, labels
        self.classes, self.captions = classes, captions or classes

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape[1:])

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(indices)
        images = self.images[rows]
        return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images, self.labels[rows]


class ImageFolder:
    """Images of a folder, as RGB of one size, read when asked for.

    One sub-folder a class; a caption is then the sub-folder's name. With `captions`, and a metadata.jsonl as the
    Hugging Face imagefolder has it ({"file_name": "a/1.png", "text": "a red boat"} a line), labels number its texts.

    Every image is read once at the start, so that a broken one is named before training and not in the middle:
    ValueError, or with `skip_unreadable` it is left out and listed in `skipped`.
    """

    def __init__(self, root: str | Path, image_size: int, *, skip_unreadable: bool = False, captions: bool = False):
        self.root = root = Path(root)
        if not root.is_dir():
            raise ValueError(f"data={str(root)!r}: no such folder (built in are digits, moving-digits, fashion-mnist)")
        files, self.classes = list_files(root, captions=captions)
        self.captions = tuple(name.replace("_", " ") for name in self.classes)
        self.image_size = image_size
        with ThreadPoolExecutor() as pool:
            looks = list(pool.map(lambda file: look_at(file[0], image_size), files))
        faults = [look.fault for look in looks]
        self.skipped = [path for (path, _), fault in zip(files, faults, strict=True) if fault]
        if self.skipped and not skip_unreadable:
            first = next(fault for fault in faults if fault)
            raise ValueError(
                f"data: cannot read {str(self.skipped[0])!r} ({first}); {len(self.skipped)} of {len(files)} images are "
                "unreadable; mend or remove them, or set skip_unreadable"
            )
        self.files = [file for file, fault in zip(files, faults, strict=True) if not fault]
        self.looks = [look for look in looks if not look.fault]
        if not self.files:
            raise ValueError(f"data={str(root)!r}: none of its {len(files)} images is readable")

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, self.image_size, self.image_size)

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        images = [read_image(self.files[index][0], self.image_size) for index in indices]
        return torch.stack(images), torch.tensor([self.files[index][1] for index in indices])


def list_files(root: Path, *, captions: bool, loose: bool = False) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    """(file, label) of every image of a folder, in an order that does not change, and what the labels stand for.

    That is sub-folders, or with `captions`, where there is a metadata.jsonl, its texts. loose: images may lie beside
    the sub-folders; then there are no classes, and all labels are 0. Hidden files and folders are passed over.
    Raises ValueError where there is no image.
    """
    if captions and (root / METADATA).is_file():
        return _captioned_files(root)
    # A link may lead out of the data, or back into it in circles.
    folders = sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != "." and not path.is_symlink())
    below = {folder: images for folder in folders if (images := _images_below(folder))}  # without images it is no class
    files = [(path, label) for label, images in enumerate(below.values()) for path in images]
    if loose and (beside := [path for path in sorted(root.iterdir()) if path.is_file() and _is_image(path)]):
        return [(path, 0) for path in sorted([*beside, *(path for path, _ in files)])], ()
    if not files:
        where = (
            "in it" if loose else "in its sub-folders; expected CLASS/IMAGE.png and the like, links are not followed"
        )
        raise ValueError(f"{'pictures' if loose else 'data'}={str(root)!r}: no images {where}")
    return files, tuple(folder.name for folder in below)


def _images_below(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if _is_image(path)]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.name[0] != "."


def _captioned_files(root: Path) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    """(file, number of its text) of every line of metadata.jsonl, and the texts. Raises ValueError."""
    lines = []
    for number, line in enumerate((root / METADATA).read_text(encoding="utf-8").splitlines(), 1):
        try:
            fields = json.loads(line)
            lines.append((root / fields["file_name"], str(fields["text"])))
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(
                f'data: line {number} of {str(root / METADATA)!r} is not {{"file_name": …, "text": …}}'
            ) from None
    if not lines:
        raise ValueError(f"data: {str(root / METADATA)!r} has no lines")
    texts = tuple(dict.fromkeys(text for _, text in lines))
    numbers = {text: number for number, text in enumerate(texts)}
    return [(path, numbers[text]) for path, text in lines], texts


def read_image(path: Path, size: int) -> Tensor:
    """An image as RGB, cut by `centre_crop`: (3, size, size) float32 in [-1, 1]."""
    with Image.open(path) as image:
        return centre_crop(image, size)


def read_frames(path: Path) -> list[Image.Image]:
    """An image, or the frames of an animated one, decoded."""
    with Image.open(path) as image:
        return [frame.copy() for frame in ImageSequence.Iterator(image)]


def centre_crop(image: Image.Image, size: int | tuple[int, int]) -> Tensor:
    """ADM's crop, on which ImageNet figures are made: (3, height, width) float32 in [-1, 1].

    size: of both sides, or (height, width). Halved with a box filter while it is twice too large, then bicubic until it
    just covers the size, then the middle.
    """
    height, width = (size, size) if isinstance(size, int) else size
    image = ImageOps.exif_transpose(image).convert("RGB")
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)


class Look(NamedTuple):
    """What is seen of an image that is read once."""

    fault: str | None
    width: int
    height: int
    transparent: bool


def look_at(path: Path, size: int) -> Look:
    """Reads an image as training will, to find out whether it can be read, and what it is like."""
    try:
        with Image.open(path) as image:
            seen = Look(None, *image.size, image.has_transparency_data)
            centre_crop(image, size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return Look(" ".join(str(error).split()), 0, 0, False)
    return seen


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


def save_image(image: Image.Image, path: Path, text: str = "") -> None:
    """Writes a picture in the format of its suffix, with `text` inside."""
    _write(path, encode_picture([image], path.suffix, text))


def save_animation(frames: Sequence[Image.Image], path: Path, text: str = "") -> None:
    """Writes a looping GIF or WebP, with `text` inside."""
    _write(path, encode_picture(frames, path.suffix, text))


def output_kind(out: Path, *, pictures: bool, clips: bool = False) -> str:
    """ "grid" for a picture, "animation" for a .gif or .webp of clips, "array" for a .npz, "folder" for no suffix.

    pictures: the samples are pixels; otherwise only an array can hold them. clips: they have frames.
    Raises ValueError for what cannot be written.
    """
    suffix = out.suffix.lower()
    kinds = dict.fromkeys(FORMATS, "grid") | {".npz": "array", "": "folder"}
    if clips:
        kinds |= dict.fromkeys(MOVING, "animation")
    if suffix not in kinds:
        still = [name for name in FORMATS if not (clips and name in MOVING)]
        moving = f", {' or '.join(MOVING)} for moving clips" if clips else ""
        names = f"{', '.join(still)} for a grid{moving}"
        raise ValueError(f"out={str(out)!r}: give a {names}, a .npz for an array, or a folder")
    if kinds[suffix] != "array" and not pictures:
        raise ValueError(f"out={str(out)!r}: the samples are latents, no pictures; give their vae, or a .npz")
    return kinds[suffix]


def is_sample(name: str) -> bool:
    """Whether a file of that name is one of the separate files that `write_samples` writes."""
    return re.fullmatch(r"\d{6,}\.(png|gif)", name) is not None


def write_samples(
    samples: Tensor, out: Path, *, pictures: bool, describe: Callable[[int | None], str] = lambda row: ""
) -> None:
    """Images (B, C, H, W) or clips (B, C, T, H, W) as a grid, an animation, an array or separate files.

    describe: the text inside a picture of all samples (None) or of one row of them; an array has none.
    """
    kind = output_kind(out, pictures=pictures, clips=samples.ndim == 5)
    if kind == "folder":

        def write(folder: Path) -> None:
            for row, sample in enumerate(samples):
                path = folder / f"{row:06d}{'.gif' if samples.ndim == 5 else '.png'}"
                _write(path, encode_picture(single_frames(sample, path.suffix), path.suffix, describe(row)))

        write_folder(out, write)  # in the place of what is there: no stale picture is left
    elif kind == "array":
        array = samples.float().cpu().numpy()
        if pictures:
            array = to_uint8(samples).movedim(1, -1).expand(*[-1] * (samples.ndim - 1), 3).numpy()
        with replacing(out) as temporary, temporary.open("wb") as file:
            np.savez(file, array)
    else:
        _write(out, encode_picture(sheet_frames(samples, out.suffix), out.suffix, describe(None)))


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


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)
