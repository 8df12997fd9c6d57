"""Reference statistics: what a detector finds in real pictures, computed once and saved with what made them."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from elit.evaluate.chunks import Progress, Share
from elit.evaluate.detection import DetectedFeatures, detect
from elit.evaluate.fashion_mnist import REFERENCE
from elit.evaluate.features import Detector
from elit.evaluate.pictures import Pictures, array_in, keys_of, open_pictures
from elit.evaluate.recipe import recipe_digest, versions
from elit.files import replacing

FEATURES_KEPT = 50_000  # for KID, precision and recall; means and covariances are of all pictures
ADM = {"mean": "mu", "covariance": "sigma", "spatial_mean": "mu_s", "spatial_covariance": "sigma_s"}


@dataclass(frozen=True)
class Reference:
    """F features, S spatial features, n ≤ FEATURES_KEPT pictures whose features are kept."""

    tensors: dict[str, Tensor]
    """mean (F,), covariance (F, F) float64; spatial_mean, spatial_covariance likewise; features (n, F) float32. What
    is not known is not there."""
    origin: dict[str, Any]
    """The pictures, how many, the detector and its weights, versions."""

    @property
    def count(self) -> int | None:
        """Pictures behind the mean and the covariance, where that is known."""
        return self.origin["count"]

    def describe(self) -> dict[str, Any]:
        """What made it, and the SHA-256 of its numbers."""
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
    chunk: int,
    batch_size: int = 256,
    share: Share = Share(),  # noqa: B008
    progress: Progress | None = None,
) -> Reference | None:
    """Statistics that were saved (.safetensors), ADM's (.npz with mu and sigma), or those of the pictures at `path`.

    Those of pictures are kept under OUT/references, and found there the next time; those of Fashion-MNIST's test split
    under the detector of that name come with the package. Only the main process is given
    them. Raises ValueError where they were made with another detector.
    """
    if (str(path), detector.name) == ("fashion-mnist", "fashion-mnist") and REFERENCE.is_file():
        path = REFERENCE
    if path.suffix == ".safetensors":
        return load_reference(path, detector) if share.main else None
    if path.suffix == ".npz" and not {"arr_0", "mu"} & set(keys_of(path)):
        names = ", ".join(keys_of(path))
        raise ValueError(
            f"reference={str(path)!r}: has keys {names}; expected arr_0 (pictures) or mu, sigma (statistics)"
        )
    statistics = _adm_statistics(path, detector) if path.suffix == ".npz" and "mu" in keys_of(path) else None
    if statistics is not None and "arr_0" not in keys_of(path):
        return _adm_reference(path, detector, statistics)
    pictures = open_pictures(path, image_size)
    recipe = {"pictures": pictures.describe(), "stamp": pictures.stamp(), "detector": detector.describe()}
    stored = out / "references" / f"{recipe_digest(recipe | {'chunk': chunk})[:16]}.safetensors"
    if stored.is_file():
        return load_reference(stored, detector) if share.main else None
    options: dict[str, Any] = {"chunk": chunk, "batch_size": batch_size, "share": share, "progress": progress}
    detections = detect(pictures, detector, out, **options)
    if not share.main:
        return None
    reference = reference_from(detections, pictures, detector)
    # ADM's evaluator takes the Fréchet distances from its statistics and the neighbours from its pictures.
    if statistics is not None:
        reference = Reference(
            reference.tensors | statistics, _adm_origin(path, detector) | {"pictures": reference.origin["pictures"]}
        )
    save_reference(reference, stored)
    shutil.rmtree(detections.chunks.folder)  # for ImageNet's training set 20 GB
    return reference


def reference_from(detections: DetectedFeatures, pictures: Pictures, detector: Detector) -> Reference:
    """The statistics of pictures that a detector has been over."""
    tensors = {"features": detections.rows("features", FEATURES_KEPT)}
    for prefix, name in (("", "features"), ("spatial_", "spatial")):
        if detections.has(name):
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
    """Writes a .safetensors, whole or not at all, with what made it in its header."""
    if path.suffix != ".safetensors":
        raise ValueError(f"reference={str(path)!r}: give a name that ends in .safetensors")
    tensors = {name: value.contiguous() for name, value in reference.tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"made": json.dumps(reference.origin)})


def load_reference(path: Path, detector: Detector) -> Reference:
    """What `save_reference` wrote. Raises ValueError where it is damaged, or another detector made it."""
    if not path.is_file():
        raise ValueError(f"reference={str(path)!r}: no such file")
    try:
        with safe_open(path, "pt") as file:
            recipe = (file.metadata() or {}).get("made")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"reference={str(path)!r}: damaged ({error}); make it again") from None
    if recipe is None:
        raise ValueError(f"reference={str(path)!r}: does not say what made it; give one that elit evaluate saved")
    reference = Reference(tensors, json.loads(recipe))
    theirs, ours = reference.origin["detector"], detector.describe()
    if theirs != ours:
        raise ValueError(
            f"reference={str(path)!r}: made with detector {_brief(theirs)}, not {_brief(ours)}; make it again with "
            "this one, or take that detector"
        )
    return reference


def _adm_statistics(path: Path, detector: Detector) -> dict[str, Tensor]:
    """mean, covariance and what there is of the spatial ones. Raises ValueError for another detector's."""
    there = {name: key for name, key in ADM.items() if key in keys_of(path)}
    if "covariance" not in there:
        raise ValueError(f"reference={str(path)!r}: has mu but no sigma among its keys {', '.join(keys_of(path))}")
    tensors = {name: torch.from_numpy(array_in(path, key).copy()).double() for name, key in there.items()}
    width = tensors["mean"].numel()
    if detector.name != "inception" or width != detector.width:
        raise ValueError(
            f"reference={str(path)!r}: ADM's statistics of {width} features, made with detector inception, not "
            f"{_brief(detector.describe())}; give pictures, or take that detector"
        )
    return tensors


def _adm_reference(path: Path, detector: Detector, statistics: dict[str, Tensor]) -> Reference:
    return Reference(statistics, _adm_origin(path, detector))


def _adm_origin(path: Path, detector: Detector) -> dict[str, Any]:
    """ADM's files do not say how many pictures they are of, nor with which port of Inception they are compared."""
    by = "ADM's evaluator, with TensorFlow's Inception"
    return {"name": path.name, "by": by, "count": None, "detector": detector.describe()}


def _brief(detector: dict[str, Any]) -> str:
    return f"{detector['name']} ({detector['weights'][:8]}, {detector['input']})"
