"""Scores of pictures against a reference, each stored with everything that decides it.

OUT/scores/HASH.json    scores, SHA-256 of the sample set, cost, recipe; HASH is that of the recipe
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Unpack, cast

import torch
from torch import Tensor

from elit.config import require, require_counts
from elit.elastic.load import load_network
from elit.evaluate import EvaluationWarning
from elit.evaluate.chunks import CHUNK, Progress, Share, Work
from elit.evaluate.detectors import Detector, open_detector
from elit.evaluate.metrics import frechet_distance, inception_score, kernel_distance, precision_recall
from elit.evaluate.pictures import Pictures
from elit.evaluate.recipe import Recipe, recipe_digest, versions
from elit.evaluate.reference import FEATURES_KEPT, DetectedFeatures, Reference, detect, open_reference
from elit.evaluate.samples import Sampler, SampleSet
from elit.files import write_text
from elit.sampling.engine import NetworkEngine, conditions_of
from elit.sampling.settings import Precision

FRECHET = ("fid", "fdd", "fvd", "fd")
DISTANCES = (*FRECHET, "sfid", "kid")  # lower is better; of all others, higher
METRICS = (*FRECHET, "sfid", "is", "kid", "precision", "recall", "accuracy", "steady")
COMPARED = {*FRECHET, "sfid", "kid", "precision", "recall"}  # need a reference
NEIGHBOURS = 3
FIELD_COUNT = 50_000  # samples behind published figures
OPTIONS = {
    "kid": {"subsets": 100, "subset_size": 1000, "seed": 0, "most": FEATURES_KEPT},
    "is": {"splits": 10, "seed": 0},
    "precision": {"most": FEATURES_KEPT, "neighbours": NEIGHBOURS},
    "recall": {"most": FEATURES_KEPT, "neighbours": NEIGHBOURS},
}
"""Settings of the metrics, as recipes have them; most: features kept."""


@dataclass(frozen=True)
class MetricGroup:
    """A detector, its reference, and the metrics to compute; none given: the detector's default."""

    specification: str
    detector: Detector
    reference: Reference | None
    metrics: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Result:
    """Scores of one set of pictures under one detector; the content of a score's file."""

    scores: dict[str, float]
    """By metric; kid_std and is_std are spreads over subsets and splits."""
    set_sha256: str
    """SHA-256 of the pictures in their order."""
    gflops_per_sample: float | None = None
    """All steps and guidance included; None for pictures that no network made here."""
    ms_per_sample: float | None = None
    """Likewise, in the fastest chunk, without the autoencoder."""
    saturation: float | None = None
    """Mean over a network's samples, of grey ones the contrast: `metrics.saturation`."""
    notes: tuple[str, ...] = ()
    """Reasons to doubt them."""
    recipe_sha256: str
    recipe: Recipe
    """Everything that decides them."""


def score(
    pictures: Pictures,
    detector: Detector,
    reference: Reference | None,
    *,
    out: Path,
    metrics: Sequence[str] = (),
    chunk: int = CHUNK,
    **work: Unpack[Work],
) -> Result | None:
    """Computes the metrics of the pictures; writes them into OUT/scores. None in processes but the main one.

    metrics: of those the detector offers, default its own default as far as the reference and the pictures allow.
    reference: from `open_reference`; without, only scores that compare with nothing. Raises ValueError for a metric
    that cannot be computed, with the reason.
    """
    main = work.get("share", Share()).main
    if main:
        metrics = possible_metrics(pictures, detector, reference, metrics)
    detections = detect(pictures, detector, out, chunk=chunk, **work)
    if not main:
        return None
    # A name does not decide the pictures, as a network's recipe does.
    known = {} if isinstance(pictures, SampleSet) else {"sha256": detections.digest}
    recipe = score_recipe(pictures.describe() | known, detections.count, detector, reference, metrics, chunk)
    notes = _notes(detections, detector, reference) if COMPARED & set(metrics) else ()
    for note in notes:
        warnings.warn(note, EvaluationWarning, stacklevel=2)
    drawn = pictures if isinstance(pictures, SampleSet) else None
    result = Result(
        scores=_measure(metrics, detections, pictures, reference),
        set_sha256=detections.digest,
        gflops_per_sample=drawn.gflops if drawn else None,
        ms_per_sample=drawn.ms if drawn else None,
        saturation=drawn.saturation if drawn else None,
        notes=notes,
        recipe_sha256=recipe_digest(recipe),
        recipe=recipe,
    )
    stored_score(recipe, out)  # raises where the file holds another recipe
    write_text(score_path(recipe, out), json.dumps(asdict(result), indent=2) + "\n")
    return result


def score_recipe(
    samples: Recipe,
    count: int,
    detector: Detector,
    reference: Reference | None,
    metrics: Sequence[str],
    chunk: int = CHUNK,
) -> Recipe:
    """Everything that decides a score. samples: the recipe of the pictures; metrics: from `possible_metrics`."""
    return {
        "samples": samples,
        "count": count,
        "detector": detector.describe() | {"dtype": "float32"},
        "reference": reference.describe() if reference else None,
        "metrics": {name: OPTIONS.get(name, {}) for name in metrics},
        "chunk": chunk,
        "versions": versions(),
    }


def score_path(recipe: Recipe, out: Path) -> Path:
    return out / "scores" / f"{recipe_digest(recipe)[:32]}.json"


def stored_score(recipe: Recipe, out: Path) -> Result | None:
    """The score of this recipe under OUT, None where there is none yet. Raises ValueError for a damaged file."""
    path = score_path(recipe, out)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"cannot read {str(path)!r}: damaged ({error}); remove it") from None
    if content["recipe"] != json.loads(json.dumps(recipe)):
        raise ValueError(f"cannot use {str(path)!r}: it holds another recipe; remove it")
    return Result(**content | {"notes": tuple(content["notes"])})


def possible_metrics(
    pictures: Pictures, detector: Detector, reference: Reference | None, wanted: Sequence[str]
) -> tuple[str, ...]:
    """The wanted metrics, or the possible ones of the detector's default. Raises ValueError for a wanted one that
    cannot be computed, with the reason."""
    reasons: dict[str, str] = {}
    real: Mapping[str, Tensor] = reference.tensors if reference else {}
    for name in {*detector.offers, *wanted}:
        if name not in detector.offers:
            reasons[name] = f"detector {detector.name} offers {', '.join(detector.offers)}"
        elif name in COMPARED and reference is None:
            reasons[name] = "give a reference"
        elif name in ("kid", "precision", "recall") and "features" not in real:
            reasons[name] = "the reference has no features of single pictures; give one with its pictures (arr_0)"
        elif name == "sfid" and "spatial_mean" not in real:
            reasons[name] = "the reference has no spatial statistics (mu_s, sigma_s)"
        elif name == "accuracy" and pictures.labels(0, 1) is None:
            reasons[name] = "the classes of the pictures are not known; give sub-folders, labels in arr_1, or a model"
    if missing := [name for name in wanted if name in reasons]:
        raise ValueError(f"cannot compute metrics={missing[0]!r}: {reasons[missing[0]]}")
    names = tuple(wanted) or tuple(name for name in detector.default if name not in reasons)
    if not names:
        raise ValueError(f"cannot compute any metric with detector {detector.name}: {next(iter(reasons.values()))}")
    return tuple(name for name in METRICS if name in names)


def _measure(
    metrics: Sequence[str], detections: DetectedFeatures, pictures: Pictures, reference: Reference | None
) -> dict[str, float]:
    scores: dict[str, float] = {}
    real = reference.tensors if reference else {}
    for name in metrics:
        if name in (*FRECHET, "sfid"):
            prefix, kind = ("spatial_", "spatial") if name == "sfid" else ("", "features")
            mean, covariance, moments = real[f"{prefix}mean"], real[f"{prefix}covariance"], detections.moments(kind)
            scores[name] = frechet_distance(mean, covariance, moments.mean, moments.covariance)
        elif name == "is":
            scores["is"], scores["is_std"] = inception_score(detections.rows("logits"))
        elif name == "kid":
            features = detections.rows("features", FEATURES_KEPT)
            scores["kid"], scores["kid_std"] = kernel_distance(real["features"], features)
        elif name == "accuracy":
            right = torch.eq(detections.rows("label"), cast(Tensor, pictures.labels(0, detections.count)))
            scores[name] = right.double().mean().item()
        elif name == "steady":
            scores[name] = detections.rows("steady").double().mean().item()
    if {"precision", "recall"} & set(metrics):
        features = detections.rows("features", FEATURES_KEPT)
        both = precision_recall(real["features"], features, neighbours=NEIGHBOURS)
        scores |= {name: value for name, value in zip(("precision", "recall"), both, strict=True) if name in metrics}
    return scores


def _notes(detections: DetectedFeatures, detector: Detector, reference: Reference | None) -> tuple[str, ...]:
    counts = {"samples": detections.count, "reference pictures": reference.count if reference else None}
    return tuple(
        f"{count} {name} for {detector.width} features: their covariance is singular and distances come out too "
        f"large; give more than {detector.width}"
        for name, count in counts.items()
        if count is not None and count <= detector.width
    )


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Detectors, their reference, and the conditions and precision of the network that is scored."""

    reference: Path | None = None
    """Real pictures (a folder of images, .npz, .parquet or .tar; or digits, moving-digits, fashion-mnist), statistics
    saved with elit evaluate --save-reference, or ADM's .npz."""
    detector: tuple[str, ...] = ("inception",)
    """One or more of: inception[:WEIGHTS.pth] (FID), dinov2[:NAME or FOLDER] (FDD), classifier:NAME-or-FOLDER
    (accuracy), i3d:FILE.pt (FVD), digits, moving-digits, fashion-mnist."""
    metrics: tuple[str, ...] = ()
    """Any of fid sfid fdd fvd fd is kid precision recall accuracy steady; default: each detector's usual ones."""
    out: Path = Path("runs/scores")
    """Folder for sample sets, references and scores."""
    image_size: int | None = None
    """Cut the reference's pictures (and scored files) to this size as ADM does; default: they have one size."""
    labels: tuple[str, ...] = ()
    """Classes of a model's samples, by number or name, in turn; default: all of the model's."""
    prompts: tuple[str, ...] = ()
    """Texts, in turn, for a text-conditional model; accuracy takes the first for class 0, the second for class 1 and
    so on."""
    prompts_file: Path | None = None
    """A file with one text a line instead."""
    text_encoder: str | None = None
    """Hugging Face name or folder of the encoder that a text-conditional model was trained with; default: as saved."""
    vae: Path | None = None
    """Folder of the autoencoder that the model was trained in; default: the pipeline's, if it is one."""
    chunk: int = CHUNK
    """Samples computed at once, by network, autoencoder and detector. Decides roundings, so part of the recipe."""
    batch_size: int = 256
    """Samples between two files, in whole chunks; changes no sample and no score."""
    device: str | None = None
    """Such as cuda or cpu; default: cuda where there is one."""
    dtype: Precision = "float32"
    """Precision of the network; the solver's state and the detectors stay float32."""
    compile: bool = False
    """torch.compile on the network: worth it from some hundred samples on. Part of the recipe."""

    def __post_init__(self) -> None:
        require_counts(self, "chunk", "batch_size", "image_size")
        require(bool(self.detector), "detector", "none", "at least one")
        require(len(set(self.detector)) == len(self.detector), "detector", " ".join(self.detector), "named once each")
        file = self.prompts_file
        require(file is None or file.is_file(), "prompts_file", str(file), "a file that is there")

    def work(self, share: Share, progress: Progress | None = None) -> Work:
        return {"batch_size": self.batch_size, "share": share, "progress": progress}

    def open_metrics(self, device: str, out: Path, share: Share, progress: Progress | None = None) -> list[MetricGroup]:
        """The detectors with their references and metrics. Raises ValueError where one is missing or does not fit."""
        groups = []
        for specification in self.detector:
            detector, reference = open_detector(specification, device=device), None
            if self.reference is not None:
                sizes = {"image_size": self.image_size, "chunk": self.chunk}
                reference = open_reference(self.reference, detector, out=out, **sizes, **self.work(share, progress))
            names = tuple(name for name in self.metrics if name in detector.offers)
            # With none of them, the detector's own refusal lists its metrics.
            groups.append(MetricGroup(specification, detector, reference, names or self.metrics))
        for name in self.metrics:
            offered = any(name in group.detector.offers for group in groups)
            require(offered, "metrics", name, f"of {', '.join(n for group in groups for n in group.detector.offers)}")
        return groups

    def open_sampler(self, folder: Path, device: str, out: Path) -> Sampler:
        """The model in `folder` with its autoencoder and the conditions of its samples."""
        model, vae = load_network(folder, vae=self.vae, device=device, dtype=getattr(torch, self.dtype))
        file = self.prompts_file
        prompts = self.prompts if file is None else file.read_text(encoding="utf-8").splitlines()
        conditions = conditions_of(NetworkEngine(model, text_encoder=self.text_encoder), self.labels, prompts)
        return Sampler(model, out, vae=vae, conditions=conditions, chunk=self.chunk, compile=self.compile)
