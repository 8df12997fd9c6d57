"""A detector run over pictures; its features are kept chunk by chunk, like the pictures themselves."""

import math
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from elit.evaluate.chunks import CHUNK, Chunks, Share, Work
from elit.evaluate.features import Detector
from elit.evaluate.metrics import Moments
from elit.evaluate.pictures import Pictures, as_samples
from elit.evaluate.recipe import claim_folder, recipe_digest, sample_digests, set_digest


class DetectedFeatures:
    """A detector's results for `count` pictures; tensors are named as the fields of `Detection`."""

    def __init__(self, chunks: Chunks, count: int):
        self.chunks, self.count = chunks, count

    def rows(self, name: str, limit: int | None = None) -> Tensor:
        """(count, ...) of one tensor; above `limit`, that many of them, evenly spaced."""
        if limit is None or self.count <= limit:
            return self.chunks.read(0, self.count, name)
        rows = torch.arange(limit) * self.count // limit
        parts, first = [], 0
        for part in self.chunks.stream(self.count, name):
            inside = rows[(rows >= first) & (rows < first + len(part))]
            parts.append(part[inside - first])
            first += len(part)
        return torch.cat(parts)

    def moments(self, name: str) -> Moments:
        """Mean and covariance of one tensor, summed in the order of the pictures."""
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
    pictures: Pictures, detector: Detector, out: Path, *, chunk: int = CHUNK, **work: Unpack[Work]
) -> DetectedFeatures:
    """Runs the detector over all pictures, together with the other processes.

    Features that a killed run has found in the same pictures are under OUT/features and are not computed again.
    Raises ValueError for a picture that cannot be used, and for features that are not finite.
    """
    share = work.get("share", Share())
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
    chunks.fill(len(pictures), lambda first: _detect_chunk(pictures, detector, first, chunk), **work)
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
