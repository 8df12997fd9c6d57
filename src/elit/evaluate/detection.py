"""A detector run over pictures; what it finds is kept chunk by chunk, like the pictures themselves."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elit.evaluate.chunks import Chunks, Progress, Share
from elit.evaluate.features import Detector
from elit.evaluate.pictures import Pictures, as_samples
from elit.evaluate.recipe import claim_folder, recipe_digest, sample_digests, set_digest
from elit.evaluate.statistics import Moments


class DetectedFeatures:
    """What a detector found in `count` pictures; tensors are named as the fields of `Detection`."""

    def __init__(self, chunks: Chunks, count: int):
        self.chunks, self.count = chunks, count

    def has(self, name: str) -> bool:
        return name in self.chunks.names()

    def rows(self, name: str, most: int | None = None) -> Tensor:
        """(count, ...) of one tensor; where that is more than `most`, so many of them, evenly spaced."""
        if most is None or self.count <= most:
            return self.chunks.read(0, self.count, name)
        rows = torch.arange(most) * self.count // most
        parts, first = [], 0
        for part in self.chunks.stream(self.count, name):
            inside = rows[(rows >= first) & (rows < first + len(part))]
            parts.append(part[inside - first])
            first += len(part)
        return torch.cat(parts)

    def moments(self, name: str) -> Moments:
        """Mean and covariance of one tensor; sums are in the order of the pictures, whoever looked at them."""
        total: Moments | None = None
        for part in self.chunks.stream(self.count, name):
            total = (total or Moments(part.shape[1])).add(part)
        assert total is not None
        return total

    @property
    def digest(self) -> str:
        """SHA-256 of the pictures in their order."""
        return set_digest(self.rows("sha256"))


def detect(
    pictures: Pictures,
    detector: Detector,
    out: Path,
    *,
    chunk: int,
    batch_size: int,
    share: Share,
    progress: Progress | None = None,
) -> DetectedFeatures:
    """Runs the detector over all pictures, `chunk` at once, together with the other processes.

    What a killed run has found in the same pictures is under OUT/features, and is not looked for again.
    Raises ValueError for a picture that cannot be used, and for features that are not finite.
    """
    recipe = {
        "pictures": pictures.describe(),
        "stamp": pictures.stamp(),
        "count": len(pictures),
        "detector": detector.describe(),
        "chunk": chunk,
    }
    folder = out / "features" / recipe_digest(recipe)[:16]
    if share.main:
        claim_folder(folder, recipe)
    share.wait()
    chunks = Chunks(folder, chunk)
    options: dict[str, Any] = {"batch_size": batch_size, "share": share, "progress": progress}
    chunks.fill(len(pictures), lambda first: _detect_chunk(pictures, detector, first, chunk), **options)
    return DetectedFeatures(chunks, len(pictures))


def _detect_chunk(pictures: Pictures, detector: Detector, first: int, size: int) -> dict[str, Tensor]:
    """The rows of a chunk. Behind the end the last picture is repeated, so that every chunk has one shape."""
    read = pictures.read(first, min(first + size, len(pictures)))
    read = torch.cat([read, read[-1:].expand(size - len(read), *read.shape[1:])])
    detection = detector(as_samples(read))
    rows = {name: value.cpu() for name, value in detection._asdict().items() if value is not None}
    if not math.isfinite(float(rows["features"].sum())):
        raise ValueError(f"detector={detector.name!r}: its features of pictures from {first} on are not finite")
    return {name: value.contiguous() for name, value in rows.items()} | {"sha256": sample_digests(read)}
