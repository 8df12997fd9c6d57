"""Images and clips in memory, and images in a folder."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence
from torch import Tensor

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
