"""Features of pictures, kept chunk by chunk, and reference statistics of real ones with their recipe."""

import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from elit.evaluate.chunks import Chunks, Progress, Recipe, Work, keep_recipe, recipe_digest, sample_digests, versions
from elit.evaluate.detectors import FASHION, Detector
from elit.evaluate.metrics import FEATURES_KEPT, moments
from elit.evaluate.pictures import Pictures, array_in, as_samples, keys_of, open_pictures
from elit.files import replacing

FASHION_REFERENCE = FASHION.with_name("test-statistics.safetensors")
ADM = {"mean": "mu", "covariance": "sigma", "spatial_mean": "mu_s", "spatial_covariance": "sigma_s"}


def detect(pictures: Pictures, detector: Detector, work: Work, progress: Progress | None = None) -> Chunks:
    """Runs the detector over all pictures, together with the other processes; tensors are named as in `Detection`."""
    recipe = {
        "pictures": pictures.recipe,
        "stamp": pictures.stamp,
        "count": pictures.count,
        "detector": detector.describe(),
        "chunk": work.chunk,
    }
    chunks = work.chunks("features", recipe, pictures.count)
    keep_recipe(chunks.folder, recipe, work)

    def rows(first: int) -> dict[str, Tensor]:
        read = pictures.read(first, min(first + work.chunk, pictures.count))
        # Behind the end the last picture is repeated, so that every chunk has one shape.
        read = torch.cat([read, read[-1:].expand(work.chunk - len(read), *read.shape[1:])])
        found = {name: value for name, value in detector(as_samples(read))._asdict().items() if value is not None}
        if not math.isfinite(float(found["features"].sum())):
            raise ValueError(f"detector={detector.name!r}: its features of pictures from {first} on are not finite")
        return {name: value.cpu().contiguous() for name, value in found.items()} | {"sha256": sample_digests(read)}

    chunks.fill(rows, work, progress)
    return chunks


@dataclass(frozen=True)
class Reference:
    """F features, S spatial features, n ≤ FEATURES_KEPT pictures whose features are kept."""

    tensors: dict[str, Tensor]
    """mean (F,), covariance (F, F) float64; spatial_mean, spatial_covariance likewise; features (n, F)."""
    origin: Recipe  # the pictures, their number (None where unknown), the detector and its weights, versions

    def describe(self) -> Recipe:
        """Its recipe, and the SHA-256 of its numbers."""
        total = hashlib.sha256()
        for name, value in sorted(self.tensors.items()):
            total.update(name.encode() + value.contiguous().numpy().tobytes())
        return {"made": self.origin, "sha256": total.hexdigest()}


def open_reference(
    path: Path, detector: Detector, work: Work, *, image_size: int | None = None, skip_unreadable: bool = False
) -> Reference | None:
    """Saved statistics, ADM's, or those of pictures, kept in OUT/references; None but in the main process."""
    if (str(path), detector.name) == ("fashion-mnist", "fashion-mnist") and FASHION_REFERENCE.is_file():
        path = FASHION_REFERENCE
    if path.suffix == ".safetensors":
        return load_reference(path, detector) if work.main else None
    adm: Reference | None = None
    if path.suffix == ".npz" and {"mu", "sigma"} <= set(keys := keys_of(path)):
        adm = _adm_reference(path, detector)
        if "arr_0" not in keys:
            return adm
    pictures = open_pictures(path, image_size, skip_unreadable=skip_unreadable)
    recipe = {"pictures": pictures.recipe, "stamp": pictures.stamp, "detector": detector.describe()}
    stored = work.out / "references" / f"{recipe_digest(recipe | {'chunk': work.chunk})[:16]}.safetensors"
    if stored.is_file():
        return load_reference(stored, detector) if work.main else None
    reference = measure_reference(pictures, detector, work)
    if reference is None:
        return None
    # ADM's evaluator takes the Fréchet distances from its statistics and the neighbours from its pictures.
    if adm is not None:
        origin = adm.origin | {"pictures": reference.origin["pictures"]}
        reference = Reference(reference.tensors | adm.tensors, origin)
    save_reference(reference, stored)
    return reference


def measure_reference(
    pictures: Pictures, detector: Detector, work: Work, progress: Progress | None = None
) -> Reference | None:
    """The statistics of the detector's features; None in processes but the main one."""
    found = detect(pictures, detector, work, progress)
    if not work.main:
        return None
    tensors = {"features": found.some("features", FEATURES_KEPT)}
    for prefix, name in (("", "features"), ("spatial_", "spatial")):
        if name == "features" or "sfid" in detector.offers:
            tensors[f"{prefix}mean"], tensors[f"{prefix}covariance"] = moments(found.stream(name))
    origin = {
        "pictures": pictures.recipe | {"sha256": found.digest},
        "count": pictures.count,
        "size": list(pictures.read(0, 1).shape[1:]),
        "detector": detector.describe(),
        "chunk": work.chunk,
        "versions": versions(),
    }
    shutil.rmtree(found.folder)  # for ImageNet's training set 20 GB
    return Reference(tensors, origin)


def save_reference(reference: Reference, path: Path) -> None:
    """Writes a .safetensors with the recipe in its header."""
    tensors = {name: value.contiguous() for name, value in reference.tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"made": json.dumps(reference.origin)})


def load_reference(path: Path, detector: Detector) -> Reference:
    """Reads a file of `save_reference`. Raises ValueError where it is damaged, or another detector made it."""
    try:
        with safe_open(path, "pt") as file:
            recipe = (file.metadata() or {}).get("made")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read reference={str(path)!r}: missing or damaged ({error}); make it again") from None
    if recipe is None:
        raise ValueError(f"cannot use reference={str(path)!r}: no recipe in it; give one that elit evaluate saved")
    reference = Reference(tensors, json.loads(recipe))
    made = reference.origin["detector"]
    if made != detector.describe():
        with_other = f"made with detector {made['name']} ({made['weights'][:8]}, {made['input']}), not {detector.name}"
        raise ValueError(f"cannot use reference={str(path)!r}: {with_other}; make it again")
    return reference


def _adm_reference(path: Path, detector: Detector) -> Reference:
    keys = keys_of(path)
    tensors = {name: torch.from_numpy(array_in(path, key)).double() for name, key in ADM.items() if key in keys}
    width = tensors["mean"].numel()
    if detector.name != "inception" or width != detector.width:
        fault = f"ADM's statistics of {width} features, made with detector inception, not {detector.name}"
        raise ValueError(f"cannot use reference={str(path)!r}: {fault}")
    by = "ADM's evaluator, with TensorFlow's Inception"
    return Reference(tensors, {"name": path.name, "by": by, "count": None, "detector": detector.describe()})
