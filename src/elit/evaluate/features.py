"""Detectors, and the small ones that are trained here: images or clips to features and classes."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elit.data.images import ImageSet
from elit.models.saved import weights_digest


class Detection(NamedTuple):
    """A detector's results for a batch."""

    features: Tensor
    """(B, F)."""
    label: Tensor | None = None
    """(B,) int64, the recognised class, by detectors that know classes."""
    steady: Tensor | None = None
    """(B,) bool for clips: every frame shows that class."""
    logits: Tensor | None = None
    """(B, K), for the Inception score."""
    spatial: Tensor | None = None
    """(B, S), features with positions, for sFID."""


class Detector:
    """A network that turns samples (B, C, ...) in [-1, 1] into a `Detection`."""

    name: str
    width: int
    """F, features of a sample."""
    distance: str
    """Name of the Fréchet distance on its features: fid, fdd, fvd, or fd."""
    offers: tuple[str, ...]
    """Metrics that can be computed from its detections."""
    default: tuple[str, ...]
    """Those computed unless others are wanted."""
    weights: str
    """SHA-256 of its weights."""
    input: str
    """Preparation of the pictures, in words."""

    def describe(self) -> dict[str, str]:
        """Its part of a recipe."""
        return {"name": self.name, "weights": self.weights, "input": self.input}

    def __call__(self, samples: Tensor) -> Detection:
        raise NotImplementedError


class Classifier(nn.Module):
    """A small network whose features are the units before its last layer."""

    def __init__(self, body: nn.Module, features: int, num_classes: int):
        super().__init__()
        self.body, self.head = body, nn.Linear(features, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 1, H, W) in [-1, 1] -> features (B, F), logits (B, classes)."""
        features = self.body(images)
        return features, self.head(features)


class DigitClassifier(Classifier):
    """Two convolutions and two linear layers for 8×8 digits."""

    def __init__(self, num_classes: int = 10, features: int = 64):
        body = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 48, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(48 * 16, features),
            nn.ReLU(),
        )
        super().__init__(body, features, num_classes)


@dataclass(frozen=True)
class TrainedClassifier:
    model: DigitClassifier
    accuracy: float
    """On the images it was not trained on."""
    held_out: int
    """Number of those images."""


def train_digit_classifier(data: ImageSet, *, epochs: int = 25, seed: int = 0) -> TrainedClassifier:
    """Trains on four fifths of the digits and scores itself on the last fifth; a few seconds."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data), generator=generator)
    held_out, training = order[: len(order) // 5], order[len(order) // 5 :]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitClassifier(len(data.classes))
    batch_size = 64
    steps = epochs * len(training) // batch_size
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        batch = training[torch.randint(len(training), (batch_size,), generator=generator)]
        images, labels = data.__getitems__(batch.tolist())
        images = images + 0.1 * torch.randn(images.shape, generator=generator)
        loss = F.cross_entropy(model(images)[1], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        images, labels = data.__getitems__(held_out.tolist())
        accuracy = (model(images)[1].argmax(1) == labels).float().mean().item()
    return TrainedClassifier(model, accuracy, len(held_out))


class ImageDetector(Detector):
    """Grey images of a classifier's own size; of three channels the first."""

    name, distance, size = "digits", "fd", 8
    offers = ("fd", "accuracy", "is", "kid", "precision", "recall")
    default = ("fd", "accuracy", "precision", "recall")

    def __init__(self, classifier: Classifier):
        self.classifier, self.width = classifier, classifier.head.in_features
        self.weights, self.input = weights_digest(classifier), f"{self.size}×{self.size} grey"

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Detection:
        if samples.shape[2:] != (self.size, self.size):
            raise ValueError(
                f"detector={self.name!r}: takes {self.size}×{self.size} pictures; these are {tuple(samples.shape[2:])}"
            )
        features, logits = self.classifier(samples[:, :1].to(next(self.classifier.parameters()).device))
        return Detection(features, logits.argmax(1), logits=logits)


class ClipDetector(ImageDetector):
    """Clips (B, 1, T, H, W): each frame cut out around its digit; features and class are the mean over the frames."""

    name = "moving-digits"
    offers = (*ImageDetector.offers, "steady")
    default = (*ImageDetector.default, "steady")

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Detection:
        if samples.ndim != 5:
            raise ValueError("detector='moving-digits': takes clips; these are pictures")
        frames = samples[:, :1].transpose(1, 2).flatten(0, 1)  # (B·T, 1, H, W)
        features, logits = (part.unflatten(0, (len(samples), -1)) for part in self.classifier(centred(frames)))
        p = logits.softmax(-1).mean(1)
        label = p.argmax(1)
        return Detection(features.mean(1), label, (logits.argmax(-1) == label[:, None]).all(1), logits=p.log())


def centred(images: Tensor, size: int = 8) -> Tensor:
    """Windows (B, 1, size, size) around the centre of mass of bright ink on -1, from images (B, 1, H, W)."""
    ink = (images[:, 0] + 1).clamp(min=0).square()  # squared: faint noise far away should not pull
    mass = ink.sum((1, 2)).clamp(min=1e-6)
    corner = []
    for axis in (1, 2):
        place = torch.arange(images.shape[axis + 1], device=images.device, dtype=ink.dtype)
        centre = (ink.sum(3 - axis) * place).sum(1) / mass
        corner.append((centre - (size - 1) / 2).round().long() + size)  # + size for the padding
    rows, columns = (first[:, None] + torch.arange(size, device=images.device) for first in corner)
    padded = F.pad(images[:, 0], (size,) * 4, value=-1.0)
    return padded[torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None]][:, None]
