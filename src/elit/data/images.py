"""Images and clips in memory, pictures of a source, encoded latents, and prompts in the place of labels.

A data set gives images (B, C, ...) float32 in [-1, 1] and labels (B,) int64 by `__getitems__`. It has `classes`,
`captions` (a prompt for each label), `shape` of an image, `folder`, and `stamp`, which changes with its files.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from elit.data.reader import centre_crop
from elit.data.source import KEPT, Source
from elit.files import Json, write_text
from elit.models.conditioning import Condition
from elit.sampling.autoencoders import LatentNormalization


class ImageSet:
    """Images in memory: float32 in [-1, 1] or uint8, (N, C, H, W) or (N, C, T, H, W), and labels (N,) int64."""

    folder: Path | None = None
    stamp = ""

    def __init__(self, images: Tensor, labels: Tensor, classes: tuple[str, ...], captions: tuple[str, ...] = ()):
        self.images, self.labels = images, labels
        self.classes, self.captions = classes, captions or classes
        self.shape: tuple[int, ...] = tuple(images.shape[1:])

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(indices)
        images = self.images[rows]
        return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images, self.labels[rows]


class ImageFiles:
    """Pictures of a source, as RGB of one size, read on access; broken ones are a ValueError, or are left out."""

    def __init__(self, source: Source, image_size: int, *, skip_unreadable: bool = False):
        found = dict(enumerate(inspect_pictures(source)))
        self.skipped = [reason for reason in found.values() if isinstance(reason, str)]
        if self.skipped and (not skip_unreadable or len(self.skipped) == len(source)):
            count = f"{len(self.skipped)} of {len(source)} pictures are unreadable"
            raise ValueError(f"{self.skipped[0]}; {count}; mend or remove them, or set skip_unreadable for a few")
        sizes = {row: size for row, size in found.items() if not isinstance(size, str)}
        self.source, self.sizes, self.image_size = source.subset(list(sizes)), list(sizes.values()), image_size
        self.classes, self.captions = source.classes, source.captions
        self.shape = (3, image_size, image_size)
        self.folder, self.stamp = source.folder, str(source.identity["stamp"])

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        images = [centre_crop(self.source.read(index)[0], self.image_size) for index in indices]
        return torch.stack(images), torch.tensor([self.source.labels[index] for index in indices])

    def summary(self) -> list[str]:
        """Lines to print before a run: pictures a class, then what is out of the ordinary."""
        counts = Counter(self.source.labels).values()
        sizes = sorted((width * height, f"{width}×{height}") for width, height in self.sizes)
        classes = f"{len(counts)} class{'es' * (len(counts) > 1)} of {min(counts)} to {max(counts)}"
        lines = [f"data: {len(self):,} images of {sizes[0][1]} to {sizes[-1][1]}, {classes}"]
        if self.skipped:
            lines.append(f"data: left out: {len(self.skipped)} unreadable images; {self.skipped[0]}")
        if small := sum(min(size) < self.image_size for size in self.sizes):
            lines.append(f"data: {small} images are smaller than image_size={self.image_size} and are enlarged")
        return lines + self.source.not_taken()


def inspect_pictures(source: Source, count: int | None = 1) -> list[tuple[int, int] | str]:
    """Each picture's size, or why its frames cannot be read; kept beside them until a file changes."""
    identity = source.identity | ({"frames": "all"} if count is None else {})
    paths = source.folder / f".{source.root.name}{KEPT}", Path(gettempdir()) / f"elit-{source.identity['stamp']}{KEPT}"
    for path in paths:
        with suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["identity"] == identity:
                return [each if isinstance(each, str) else (each[0], each[1]) for each in kept["pictures"]]

    def inspect(index: int) -> tuple[int, int] | str:
        try:
            return source.read(index, count)[0].size
        except ValueError as error:
            return str(error)

    console = Console(stderr=True)
    with ThreadPoolExecutor() as pool:
        found = pool.map(inspect, range(len(source)))
        shown = track(found, "reading pictures", len(source), console=console, disable=not console.is_terminal)
        pictures = list(shown)
    for path in paths:  # the second for a folder that is not the user's
        with suppress(OSError):
            write_text(path, json.dumps({"identity": identity, "pictures": pictures}))
            break
    return pictures


class PromptedImages:
    """A data set whose labels number prompts: gives the prompts' rows of `table` in their place."""

    def __init__(self, data: Any, table: Condition):
        self.data, self.table = data, table

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Condition]:
        images, labels = self.data.__getitems__(indices)
        return images, self.table[labels]


class LatentSet:
    """The output of `elit encode`: moments (B, 2, C, ...), mean and std. Raises ValueError where it is not whole."""

    def __init__(self, root: str | Path):
        from datasets import Dataset, concatenate_datasets  # most runs read none of these

        root = Path(root)
        index, self.settings = _read(root / "index.json"), _read(root / "encode.json")
        self.classes, self.captions = tuple(self.settings["classes"]), tuple(self.settings["caption_texts"])
        self.shape = tuple(self.settings["shape"])
        self.normalization = LatentNormalization.from_json(self.settings["autoencoder"])
        self.folder: Path | None = root
        self.stamp = hashlib.sha256(json.dumps(index).encode()).hexdigest()
        parts = []
        for shard in index["shards"]:
            path = str(root / shard["file"])
            try:
                parts.append(part := Dataset.from_file(path))
                if len(part) != shard["rows"]:
                    raise ValueError(f"{len(part)} rows, {shard['rows']} wanted")
            except (OSError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"data: {path!r} is damaged ({reason}); remove it and run elit encode") from None
            # A label without a class would be an assertion deep inside a GPU.
            labels = part.data.column("label").to_numpy()
            if len(wrong := np.flatnonzero((labels < 0) | (labels >= len(self.captions)))):
                found = f"label {labels[wrong[0]]} in row {wrong[0]}"
                raise ValueError(f"data: {path!r} has {found}; encode.json has 0 to {len(self.captions) - 1}")
        self.rows = concatenate_datasets(parts)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = self.rows[list(indices)]
        flat = (np.frombuffer(b"".join(rows[name]), np.float16).astype(np.float32) for name in ("mean", "std"))
        mean, std = (torch.from_numpy(values).view(len(indices), *self.shape) for values in flat)
        moments = self.normalization.normalize(mean), self.normalization.normalize_std(std)
        return torch.stack(moments, 1), torch.tensor(rows["label"])


def posterior_sample(moments: Tensor, noise: Tensor) -> Tensor:
    """moments (B, 2, C, ...) and standard normal noise (B, C, ...) -> latents (B, C, ...)."""
    mean, std = moments.unbind(1)
    return torch.addcmul(mean, std, noise)


def _read(path: Path) -> Json:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"data: cannot read {str(path)!r} ({error}); run elit encode to its end") from None
