"""Scores: what a detector finds in pictures against a reference, each stored with everything that decides it.

OUT/scores/HASH.json    recipe, scores, SHA-256 of the sample set, cost; HASH is that of the recipe
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from elit.arguments import whole_number
from elit.evaluate import EvaluationWarning
from elit.evaluate.chunks import Progress, Share
from elit.evaluate.detection import DetectedFeatures, detect
from elit.evaluate.features import Detector
from elit.evaluate.metrics import frechet_distance, inception_score, kernel_distance, precision_recall
from elit.evaluate.pictures import Pictures
from elit.evaluate.recipe import recipe_digest, versions
from elit.evaluate.reference import FEATURES_KEPT, Reference
from elit.evaluate.samples import CHUNK, SampleSet
from elit.files import write_text

FRECHET = ("fid", "fdd", "fvd", "fd")
DISTANCES = (*FRECHET, "sfid", "kid")  # lower is better; of all others, higher
METRICS = (*FRECHET, "sfid", "is", "kid", "precision", "recall", "accuracy", "steady")
COMPARED = {*FRECHET, "sfid", "kid", "precision", "recall"}  # need a reference
KID = {"subsets": 100, "subset_size": 1000, "seed": 0}
IS = {"splits": 10, "seed": 0}
NEIGHBOURS = 3


@dataclass(frozen=True)
class MetricGroup:
    """A detector, what it compares with, and which of its metrics are wanted; none given: its own choice."""

    specification: str
    detector: Detector
    reference: Reference | None
    metrics: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Result:
    """Scores of one set of pictures under one detector."""

    scores: dict[str, float]
    """By metric; kid_std and is_std are spreads over subsets and splits."""
    recipe: dict[str, Any]
    """Everything that decides them."""
    set_sha256: str
    """Of the pictures, in their order."""
    notes: tuple[str, ...]
    """What to know before believing them."""
    path: Path
    """Where they are stored."""
    gflops: float | None = None
    """Of a sample, all steps and guidance included; None for pictures that were given."""
    ms: float | None = None
    """Of a sample in the fastest chunk, likewise, without the autoencoder."""
    saturation: float | None = None
    """Mean over a model's samples, of grey ones the contrast: `metrics.saturation`."""


def score(
    pictures: Pictures,
    detector: Detector,
    reference: Reference | None,
    *,
    out: Path,
    metrics: Sequence[str] = (),
    chunk: int = CHUNK,
    batch_size: int = 256,
    share: Share = Share(),  # noqa: B008
    progress: Progress | None = None,
) -> Result | None:
    """Looks at the pictures and scores them; the result is in OUT/scores too. None in processes but the main one.

    metrics: of those the detector offers, default its own choice of what the reference and the pictures allow.
    reference: from `open_reference`; without, only scores that compare with nothing. Raises ValueError for a metric
    that cannot be had, naming what it lacks.
    """
    chunk, batch_size = whole_number("chunk", chunk, 1), whole_number("batch_size", batch_size, 1)
    if share.main:
        metrics = possible_metrics(pictures, detector, reference, metrics)
    options: dict[str, Any] = {"chunk": chunk, "batch_size": batch_size, "share": share, "progress": progress}
    detections = detect(pictures, detector, out, **options)
    if not share.main:
        return None
    # A name does not say what the pictures are, as a network's recipe does.
    given = {} if isinstance(pictures, SampleSet) else {"sha256": detections.digest}
    recipe = score_recipe(pictures.describe() | given, detections.count, detector, reference, metrics, chunk)
    notes = _notes(detections, detector, reference) if COMPARED & set(metrics) else ()
    for note in notes:
        warnings.warn(note, EvaluationWarning, stacklevel=2)
    drawn = pictures if isinstance(pictures, SampleSet) else None
    result = Result(
        scores=_measure(metrics, detections, pictures, reference),
        recipe=recipe,
        set_sha256=detections.digest,
        notes=notes,
        path=_file(out, recipe),
        gflops=drawn.gflops if drawn else None,
        ms=drawn.ms if drawn else None,
        saturation=drawn.saturation if drawn else None,
    )
    _store(result)
    return result


def score_recipe(
    samples: dict[str, Any],
    count: int,
    detector: Detector,
    reference: Reference | None,
    metrics: Sequence[str],
    chunk: int = CHUNK,
) -> dict[str, Any]:
    """Everything that decides a score. samples: what decides the pictures; metrics: from `possible_metrics`."""
    return {
        "samples": samples,
        "count": count,
        "detector": detector.describe() | {"dtype": "float32"},
        "reference": reference.describe() if reference else None,
        "metrics": {name: _options(name) for name in metrics},
        "chunk": chunk,
        "versions": versions(),
    }


def stored_score(recipe: dict[str, Any], out: Path) -> Result | None:
    """The score of this recipe under OUT, None where there is none yet. Raises ValueError for a damaged file."""
    path = _file(out, recipe)
    if not path.is_file():
        return None
    content = _same_recipe(path, recipe)
    return Result(
        scores=content["scores"],
        recipe=content["recipe"],
        set_sha256=content["set_sha256"],
        notes=tuple(content["notes"]),
        path=path,
        gflops=content["gflops_per_sample"],
        ms=content["ms_per_sample"],
        saturation=content["saturation"],
    )


def possible_metrics(
    pictures: Pictures, detector: Detector, reference: Reference | None, wanted: Sequence[str]
) -> tuple[str, ...]:
    """The metrics asked for, or the detector's own choice less what cannot be had. Raises ValueError for the former."""
    lacks: dict[str, str] = {}
    for name in {*detector.offers, *wanted}:
        if name not in detector.offers:
            lacks[name] = f"detector {detector.name} offers {', '.join(detector.offers)}"
        elif name in COMPARED and reference is None:
            lacks[name] = "give a reference"
        elif name in ("kid", "precision", "recall") and reference and "features" not in reference.tensors:
            lacks[name] = "the reference has no features of single pictures; give one with its pictures (arr_0)"
        elif name == "sfid" and reference and "spatial_mean" not in reference.tensors:
            lacks[name] = "the reference has no spatial statistics (mu_s, sigma_s)"
        elif name == "accuracy" and pictures.labels(0, 1) is None:
            lacks[name] = "the classes of the pictures are not known; give sub-folders, labels in arr_1, or a model"
    if missing := [name for name in wanted if name in lacks]:
        raise ValueError(f"metrics={missing[0]!r}: {lacks[missing[0]]}")
    names = tuple(wanted) or tuple(name for name in detector.default if name not in lacks)
    if not names:
        raise ValueError(f"metrics: detector {detector.name} has none to give here; {next(iter(lacks.values()))}")
    return tuple(name for name in METRICS if name in names)


def _measure(
    metrics: Sequence[str], detections: DetectedFeatures, pictures: Pictures, reference: Reference | None
) -> dict[str, float]:
    scores: dict[str, float] = {}
    real = reference.tensors if reference else {}
    for name in metrics:
        if name in FRECHET:
            moments = detections.moments("features")
            scores[name] = frechet_distance(real["mean"], real["covariance"], moments.mean, moments.covariance)
        elif name == "sfid":
            moments = detections.moments("spatial")
            scores[name] = frechet_distance(
                real["spatial_mean"], real["spatial_covariance"], moments.mean, moments.covariance
            )
        elif name == "is":
            scores["is"], scores["is_std"] = inception_score(detections.rows("logits"), **IS)
        elif name == "kid":
            features = detections.rows("features", FEATURES_KEPT)
            scores["kid"], scores["kid_std"] = kernel_distance(real["features"], features, **KID)
        elif name == "accuracy":
            right = torch.eq(detections.rows("label"), cast(Tensor, pictures.labels(0, detections.count)))
            scores[name] = right.double().mean().item()
        elif name == "steady":
            scores[name] = detections.rows("steady").double().mean().item()
    if neighbours := {"precision", "recall"} & set(metrics):
        features = detections.rows("features", FEATURES_KEPT)
        both = precision_recall(real["features"], features, neighbours=NEIGHBOURS)
        scores |= {name: value for name, value in zip(("precision", "recall"), both, strict=True) if name in neighbours}
    return scores


def _options(metric: str) -> dict[str, int]:
    """What else decides a metric; for the recipe."""
    features = {"most": FEATURES_KEPT}
    neighbours = features | {"neighbours": NEIGHBOURS}
    return {"kid": KID | features, "is": IS, "precision": neighbours, "recall": neighbours}.get(metric, {})


def _notes(detections: DetectedFeatures, detector: Detector, reference: Reference | None) -> tuple[str, ...]:
    counts = [("samples", detections.count), ("reference pictures", reference.count if reference else None)]
    return tuple(
        f"{count} {what} for {detector.width} features: their covariance is singular and distances come out too "
        f"large; give more than {detector.width}"
        for what, count in counts
        if count is not None and count <= detector.width
    )


def _store(result: Result) -> None:
    """Raises ValueError where the file holds another recipe."""
    if result.path.is_file():
        _same_recipe(result.path, result.recipe)
    content = {
        "scores": result.scores,
        "set_sha256": result.set_sha256,
        "gflops_per_sample": result.gflops,
        "ms_per_sample": result.ms,
        "saturation": result.saturation,
        "notes": list(result.notes),
        "recipe_sha256": recipe_digest(result.recipe),
        "recipe": result.recipe,
    }
    write_text(result.path, json.dumps(content, indent=2) + "\n")


def _file(out: Path, recipe: dict[str, Any]) -> Path:
    return out / "scores" / f"{recipe_digest(recipe)[:32]}.json"


def _same_recipe(path: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """The content of a score's file. Raises ValueError where it is of another recipe: damaged, or renamed."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"out: {str(path)!r} is damaged ({error}); remove it") from None
    if content["recipe"] != json.loads(json.dumps(recipe)):
        raise ValueError(f"out: {str(path)!r} holds another recipe; remove it")
    return content


def load_results(out: Path) -> list[dict[str, Any]]:
    """Every score stored under OUT, as its file has it, in the order of their names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "scores").glob("*.json"))]
