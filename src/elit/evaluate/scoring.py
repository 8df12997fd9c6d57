"""Settings of scores as one dataclass, shared by `elit evaluate` and `elit sweep`."""

from dataclasses import dataclass
from pathlib import Path

import torch

from elit.config import require, require_counts
from elit.elastic.load import load_network
from elit.evaluate.chunks import CHUNK, Progress, Share, Work
from elit.evaluate.detectors import Detector, open_detector
from elit.evaluate.reference import open_reference
from elit.evaluate.samples import Sampler
from elit.evaluate.score import MetricGroup
from elit.sampling.engine import NetworkEngine, conditions_of
from elit.sampling.settings import Precision

FIELD_COUNT = 50_000  # samples behind published figures


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
    """Of fid sfid fdd fvd fd is kid precision recall accuracy steady; default: each detector's usual ones."""
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
    """Of the network; the solver's state and the detectors stay float32."""
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
        detectors = [open_detector(specification, device=device) for specification in self.detector]
        metrics = _metrics_of(detectors, self.metrics)
        groups = []
        for specification, detector, names in zip(self.detector, detectors, metrics, strict=True):
            reference = None
            if self.reference is not None:
                sizes = {"image_size": self.image_size, "chunk": self.chunk}
                reference = open_reference(self.reference, detector, out=out, **sizes, **self.work(share, progress))
            groups.append(MetricGroup(specification, detector, reference, names))
        return groups

    def open_sampler(self, folder: Path, device: str, out: Path) -> Sampler:
        """The model in `folder` with its autoencoder and the conditions of its samples."""
        model, vae = load_network(folder, vae=self.vae, device=device, dtype=getattr(torch, self.dtype))
        file = self.prompts_file
        prompts = self.prompts if file is None else file.read_text(encoding="utf-8").splitlines()
        conditions = conditions_of(NetworkEngine(model, text_encoder=self.text_encoder), self.labels, prompts)
        return Sampler(model, out, vae=vae, conditions=conditions, chunk=self.chunk, compile=self.compile)


def _metrics_of(detectors: list[Detector], metrics: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The wanted metrics that each detector offers. Raises ValueError for one that none does, and for a detector that
    offers none of them."""
    for name in metrics:
        if not any(name in detector.offers for detector in detectors):
            offers = "; ".join(f"{detector.name} offers {', '.join(detector.offers)}" for detector in detectors)
            raise ValueError(f"cannot compute metrics={name!r}: {offers}")
    wanted = [tuple(name for name in metrics if name in detector.offers) for detector in detectors]
    for detector, names in zip(detectors, wanted, strict=True):
        if metrics and not names:
            raise ValueError(f"cannot compute metrics={' '.join(metrics)!r} with detector {detector.name}")
    return wanted
