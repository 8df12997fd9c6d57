"""Features of pictures, kept chunk by chunk, and reference statistics of real ones with their recipe."""

import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from elit.evaluate.chunks import CHUNK, Chunks, Share, Work
from elit.evaluate.detectors import FASHION, Detector
from elit.evaluate.metrics import Moments
from elit.evaluate.pictures import Pictures, array_in, as_samples, keys_of, open_pictures
from elit.evaluate.recipe import Recipe, claim_folder, recipe_digest, sample_digests, set_digest, versions
from elit.files import replacing

FEATURES_KEPT = 50_000  # for KID, precision and recall; means and covariances are of all pictures
FASHION_REFERENCE = FASHION.with_name("test-statistics.safetensors")
ADM = {"mean": "mu", "covariance": "sigma", "spatial_mean": "mu_s", "spatial_covariance": "sigma_s"}


class DetectedFeatures:
    """A detector's results for `count` pictures; tensors are named as the fields of `Detection`."""

    def __init__(self, chunks: Chunks, count: int):
        self.chunks, self.count = chunks, count

    def rows(self, name: str, limit: int | None = None) -> Tensor:
        """(count, ...) of one tensor; above `limit`, that many of them, evenly spaced."""
        if limit is None or self.count <= limit:
            return self.chunks.read(0, self.count, name)
        rows = torch.arange(limit) * self.count // limit
        parts = enumerate(self.chunks.stream(self.count, name))
        size = self.chunks.size
        return torch.cat([part[rows[rows // size == number] - number * size] for number, part in parts])

    def moments(self, name: str) -> Moments:
        """Mean and covariance of one tensor, summed in the order of the pictures."""
        parts = self.chunks.stream(self.count, name)
        first = next(parts)
        total = Moments(first.shape[1]).add(first)
        for part in parts:
            total.add(part)
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
    recipe = {
        "pictures": pictures.describe(),
        "stamp": pictures.stamp(),
        "count": len(pictures),
        "detector": detector.describe(),
        "chunk": chunk,
    }
    folder = out / "features" / recipe_digest(recipe)[:16]
    claim_folder(folder, recipe, work.get("share", Share()))
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


@dataclass(frozen=True)
class Reference:
    """F features, S spatial features, n ≤ FEATURES_KEPT pictures whose features are kept."""

    tensors: dict[str, Tensor]
    """mean (F,), covariance (F, F) float64; spatial_mean, spatial_covariance likewise; features (n, F) float32. Unknown
    ones are missing."""
    origin: Recipe
    """The pictures, their number, the detector and its weights, versions."""

    @property
    def count(self) -> int | None:
        """Pictures behind the mean and the covariance; None where that is unknown."""
        return self.origin["count"]

    def describe(self) -> Recipe:
        """Its recipe, and the SHA-256 of its numbers."""
        total = hashlib.sha256()
        for name, value in sorted(self.tensors.items()):
            total.update(name.encode() + value.contiguous().numpy().tobytes())
        return {"made": self.origin, "sha256": total.hexdigest()}


def open_reference(
    path: Path,
    detector: Detector,
    *,
    out: Path,
    image_size: int | None = None,
    chunk: int = CHUNK,
    **work: Unpack[Work],
) -> Reference | None:
    """Saved statistics (.safetensors), ADM's (.npz with mu and sigma), or those of the pictures at `path`.

    Those of pictures are kept under OUT/references and found there the next time; those of Fashion-MNIST's test split
    under the detector of that name come with the package. None in processes but the main one. Raises ValueError where
    they were made with another detector.
    """
    main = work.get("share", Share()).main
    if (str(path), detector.name) == ("fashion-mnist", "fashion-mnist") and FASHION_REFERENCE.is_file():
        path = FASHION_REFERENCE
    if path.suffix == ".safetensors":
        return load_reference(path, detector) if main else None
    adm: Reference | None = None
    if path.suffix == ".npz" and "mu" in (keys := keys_of(path)):
        adm = _adm_reference(path, detector)
        if "arr_0" not in keys:
            return adm
    pictures = open_pictures(path, image_size)
    recipe = {"pictures": pictures.describe(), "stamp": pictures.stamp(), "detector": detector.describe()}
    stored = out / "references" / f"{recipe_digest(recipe | {'chunk': chunk})[:16]}.safetensors"
    if stored.is_file():
        return load_reference(stored, detector) if main else None
    detections = detect(pictures, detector, out, chunk=chunk, **work)
    if not main:
        return None
    reference = reference_from(detections, pictures, detector)
    # ADM's evaluator takes the Fréchet distances from its statistics and the neighbours from its pictures.
    if adm is not None:
        origin = adm.origin | {"pictures": reference.origin["pictures"]}
        reference = Reference(reference.tensors | adm.tensors, origin)
    save_reference(reference, stored)
    shutil.rmtree(detections.chunks.folder)  # for ImageNet's training set 20 GB
    return reference


def reference_from(detections: DetectedFeatures, pictures: Pictures, detector: Detector) -> Reference:
    """The statistics of detected features."""
    tensors = {"features": detections.rows("features", FEATURES_KEPT)}
    for prefix, name in (("", "features"), ("spatial_", "spatial")):
        if name in detections.chunks.names():
            moments = detections.moments(name)
            tensors |= {f"{prefix}mean": moments.mean, f"{prefix}covariance": moments.covariance}
    recipe = {
        "pictures": {**pictures.describe(), "sha256": detections.digest},
        "count": detections.count,
        "size": list(pictures.read(0, 1).shape[1:]),
        "detector": detector.describe(),
        "chunk": detections.chunks.size,
        "versions": versions(),
    }
    return Reference(tensors, recipe)


def save_reference(reference: Reference, path: Path) -> None:
    """Writes a .safetensors, whole or not at all, with its recipe in the header."""
    tensors = {name: value.contiguous() for name, value in reference.tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"made": json.dumps(reference.origin)})


def load_reference(path: Path, detector: Detector) -> Reference:
    """Reads a file of `save_reference`. Raises ValueError where it is damaged, or another detector made it."""
    if not path.is_file():
        raise ValueError(f"cannot read reference={str(path)!r}: no such file")
    try:
        with safe_open(path, "pt") as file:
            recipe = (file.metadata() or {}).get("made")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"cannot read reference={str(path)!r}: damaged ({error}); make it again") from None
    if recipe is None:
        raise ValueError(f"cannot use reference={str(path)!r}: no recipe in it; give one that elit evaluate saved")
    reference = Reference(tensors, json.loads(recipe))
    theirs, ours = reference.origin["detector"], detector.describe()
    if theirs != ours:
        raise ValueError(
            f"cannot use reference={str(path)!r}: made with detector {_brief(theirs)}, not {_brief(ours)}; make it "
            "again with this one, or use that detector"
        )
    return reference


def _adm_reference(path: Path, detector: Detector) -> Reference:
    """ADM's statistics, which name neither the number of pictures nor the port of Inception they are compared with.

    Raises ValueError for another detector's.
    """
    known = {name: key for name, key in ADM.items() if key in keys_of(path)}
    if "covariance" not in known:
        raise ValueError(f"reference={str(path)!r} must have mu and sigma, got {', '.join(keys_of(path))}")
    tensors = {name: torch.from_numpy(array_in(path, key).copy()).double() for name, key in known.items()}
    width = tensors["mean"].numel()
    if detector.name != "inception" or width != detector.width:
        raise ValueError(
            f"cannot use reference={str(path)!r}: ADM's statistics of {width} features, made with detector inception, "
            f"not {_brief(detector.describe())}; give pictures, or use that detector"
        )
    by = "ADM's evaluator, with TensorFlow's Inception"
    return Reference(tensors, {"name": path.name, "by": by, "count": None, "detector": detector.describe()})


def _brief(detector: Recipe) -> str:
    return f"{detector['name']} ({detector['weights'][:8]}, {detector['input']})"
