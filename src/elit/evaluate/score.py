"""Scores of pictures against a reference, each stored in OUT/scores/HASH.json with the recipe of that hash."""

import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from elit.config import require, require_counts
from elit.elastic.load import load_network
from elit.evaluate import EvaluationWarning
from elit.evaluate.chunks import CHUNK, Progress, Recipe, Work, recipe_digest, versions
from elit.evaluate.detectors import Detector, default_detector, open_detector
from elit.evaluate.metrics import METRICS
from elit.evaluate.pictures import Pictures
from elit.evaluate.reference import Reference, detect, open_reference
from elit.evaluate.samples import Sampler, SampleSet
from elit.files import read_lines, write_text
from elit.sampling.engine import NetworkEngine, conditions_of
from elit.sampling.pictures import Subject
from elit.sampling.settings import Precision

if TYPE_CHECKING:
    from accelerate import PartialState

FIELD_COUNT = 50_000  # samples behind published figures
MISSING = {
    "mean": "give a reference",
    "features": "give a reference with its pictures (arr_0), whose features are compared one by one",
    "spatial_mean": "the reference has no spatial statistics (mu_s, sigma_s)",
    "labels": "the classes of the pictures are not known; give sub-folders, labels in arr_1, or a model",
}


@dataclass(frozen=True)
class MetricGroup:
    """A detector, its reference, and the metrics to compute; none given: the detector's default."""

    specification: str
    detector: Detector
    reference: Reference | None = None
    metrics: tuple[str, ...] = ()

    def possible(self, pictures: Pictures) -> tuple[str, ...]:
        """The metrics, or those of the detector's default that can be computed. Raises ValueError with the reason."""
        offers = self.detector.offers
        known = {"", *(self.reference.tensors if self.reference else ())}
        known |= set() if pictures.labels is None else {"labels"}
        reasons = {name: MISSING[METRICS[name].needs] for name in offers if METRICS[name].needs not in known}
        other = f"detector {self.detector.name} offers {', '.join(offers)}"
        reasons |= {name: other for name in self.metrics if name not in offers}
        names = self.metrics or [name for name in self.detector.default if name not in reasons]
        for name in names or self.detector.default:
            if name in reasons:
                raise ValueError(f"cannot compute metrics={name!r}: {reasons[name]}")
        return tuple(name for name in METRICS if name in names)

    def recipe(self, pictures: Pictures, chunk: int, **known: str) -> Recipe:
        """Everything that decides a score. known: of the pictures, beside their own recipe."""
        return {
            "samples": pictures.recipe | known,
            "count": pictures.count,
            "detector": self.detector.describe() | {"dtype": "float32"},
            "reference": self.reference.describe() if self.reference else None,
            "metrics": {name: METRICS[name].options for name in self.possible(pictures)},
            "chunk": chunk,
            "versions": versions(),
        }


@dataclass(frozen=True, kw_only=True)
class Result:
    """Scores of one set of pictures under one detector; the content of a score's file."""

    scores: dict[str, float]  # by metric; kid_std and is_std are spreads over subsets and splits
    set_sha256: str  # SHA-256 of the pictures in their order
    gflops_per_sample: float | None = None
    """All steps and guidance included; None for pictures that no network made here."""
    ms_per_sample: float | None = None  # likewise, in the fastest chunk, without the autoencoder
    saturation: float | None = None  # mean over a network's samples, of grey ones the contrast: `metrics.saturation`
    notes: tuple[str, ...] = ()  # reasons to doubt them
    recipe_sha256: str
    recipe: Recipe  # everything that decides them


def score(pictures: Pictures, group: MetricGroup, work: Work, progress: Progress | None = None) -> Result | None:
    """Computes the metrics of the pictures; writes them into OUT/scores. None in processes but the main one."""
    if work.main:
        group.possible(pictures)
    found = detect(pictures, group.detector, work, progress)
    if not work.main:
        return None
    drawn = pictures if isinstance(pictures, SampleSet) else None
    # A name does not decide the pictures, as a network's recipe does.
    known = {} if drawn else {"sha256": found.digest}
    recipe, reference = group.recipe(pictures, work.chunk, **known), group.reference
    real = reference.tensors if reference else {}
    labels = torch.empty(0) if pictures.labels is None else pictures.labels[: pictures.count]
    scores: dict[str, float] = {}
    for name in recipe["metrics"]:
        value = METRICS[name].compute(found, real, labels)
        scores |= {name: value[0], f"{name}_std": value[1]} if isinstance(value, tuple) else {name: value}
    counts = {"samples": pictures.count, "reference pictures": reference.origin["count"] if reference else None}
    compared = any(METRICS[name].needs not in ("", "labels") for name in recipe["metrics"])
    width, notes = group.detector.width, []
    for name, count in counts.items():
        if compared and count is not None and count <= width:
            notes.append(
                f"{count} {name} for {width} features: their covariance is singular and distances come out too large; "
                f"give more than {width}"
            )
            warnings.warn(notes[-1], EvaluationWarning, stacklevel=2)
    result = Result(
        scores=scores,
        set_sha256=found.digest,
        gflops_per_sample=drawn.gflops if drawn else None,
        ms_per_sample=drawn.ms if drawn else None,
        saturation=drawn.saturation if drawn else None,
        notes=tuple(notes),
        recipe_sha256=recipe_digest(recipe),
        recipe=recipe,
    )
    write_text(score_path(recipe, work.out), json.dumps(asdict(result), indent=2) + "\n")
    return result


def score_path(recipe: Recipe, out: Path) -> Path:
    return out / "scores" / f"{recipe_digest(recipe)[:32]}.json"


def stored_score(recipe: Recipe, out: Path) -> Result | None:
    """The score of this recipe under OUT, None where there is none yet. Raises ValueError for a damaged file."""
    path = score_path(recipe, out)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Result(**content | {"notes": tuple(content["notes"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"cannot read {str(path)!r}: damaged ({error}); remove it") from None


@dataclass(frozen=True, kw_only=True)
class Scoring(Subject):
    """Detectors, their reference, and the conditions and precision of the network that is scored."""

    reference: Path | None = None
    """Real pictures (a folder of images, .npz, .parquet or .tar; or digits, moving-digits, fashion-mnist), statistics
    saved with elit evaluate --save-reference, or ADM's .npz."""
    detector: tuple[str, ...] = ()
    """One or more of: inception[:WEIGHTS.pth] (FID), dinov2[:NAME or FOLDER] (FDD), classifier:NAME-or-FOLDER
    (accuracy), i3d:FILE.pt (FVD), pyramid (colours and textures, no network), digits, moving-digits, fashion-mnist.
    Default: that of the reference by name; else inception where the extra eval is installed, or pyramid."""
    metrics: tuple[str, ...] = ()  # Of fid sfid fdd fvd fd is kid precision recall accuracy steady; default: the usual.
    image_size: int | None = None  # Cut given pictures to this as ADM does; default: they have one size.
    skip_unreadable: bool = False  # Leave unreadable pictures out instead of stopping at the first.
    prompts: tuple[str, ...] = ()  # Texts, in turn; accuracy takes the first for class 0, the second for class 1.
    prompts_file: Path | None = None  # A file with one text a line instead.
    vae: Path | None = None  # Folder of the autoencoder that the model was trained in; default: the pipeline's.
    chunk: int = CHUNK  # Samples computed at once, by all networks; decides roundings, so part of the recipe.
    batch_size: int = 256  # Samples between two files, in whole chunks; changes no sample and no score.
    device: str | None = None  # Such as cuda or cpu; default: cuda where there is one.
    dtype: Precision = "float32"  # Precision of the network; the solver's state and the detectors stay float32.
    compile: bool = False  # torch.compile on the network: worth it from some hundred samples on. Part of the recipe.

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "chunk", "image_size")
        object.__setattr__(self, "detector", self.detector or (default_detector(str(self.reference)),))

    def work(self, folder: Path, state: "PartialState") -> Work:
        return Work(out=folder, chunk=self.chunk, batch_size=self.batch_size, state=state)

    def open_metrics(self, device: str, work: Work) -> list[MetricGroup]:
        detectors = [open_detector(specification, device=device) for specification in self.detector]
        offered = [name for detector in detectors for name in detector.offers]
        for name in self.metrics:
            require(name in offered, "metrics", name, f"of {', '.join(offered)}")
        groups = []
        for specification, detector in zip(self.detector, detectors, strict=True):
            real = self.reference
            options = {"image_size": self.image_size, "skip_unreadable": self.skip_unreadable}
            reference = None if real is None else open_reference(real, detector, work, **options)
            names = tuple(name for name in self.metrics if name in detector.offers)
            # With none of them, the detector's own refusal lists its metrics.
            groups.append(MetricGroup(specification, detector, reference, names or self.metrics))
        return groups

    def open_sampler(self, folder: Path, device: str, work: Work) -> Sampler:
        model, vae = load_network(folder, vae=self.vae, device=device, dtype=getattr(torch, self.dtype))
        file = self.prompts_file
        prompts = self.prompts if file is None else read_lines(file)
        conditions = conditions_of(NetworkEngine(model, text_encoder=self.text_encoder), self.labels, prompts)
        return Sampler(model, work, vae=vae, conditions=conditions, compile=self.compile)
