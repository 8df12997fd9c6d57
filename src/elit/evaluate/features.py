"""Detectors: networks that turn images or clips into features and class predictions."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elit.data.images import ImageSet


class Detection(NamedTuple):
    """What a detector finds in a batch."""

    features: Tensor
    """(B, F)."""
    label: Tensor
    """(B,) int64, the class seen."""
    steady: Tensor | None = None
    """(B,) bool for clips: whether every frame shows that class."""


class Detector(Protocol):
    """Samples (B, C, ...) in [-1, 1] -> `Detection`."""

    width: int
    """F, features of a sample."""

    def __call__(self, samples: Tensor) -> Detection: ...


class DigitClassifier(nn.Module):
    """A small convolutional classifier of 8×8 digits; its features are the 64 units before the last layer."""

    def __init__(self, num_classes: int = 10, features: int = 64):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 48, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(48 * 16, features),
            nn.ReLU(),
        )
        self.head = nn.Linear(features, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 1, 8, 8) in [-1, 1] -> features (B, 64), logits (B, classes)."""
        features = self.body(images)
        return features, self.head(features)


@dataclass(frozen=True)
class TrainedClassifier:
    model: DigitClassifier
    accuracy: float
    """On the images it was not trained on."""
    held_out: int
    """How many those were."""


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
        chosen = training[torch.randint(len(training), (batch_size,), generator=generator)]
        images, labels = data.__getitems__(chosen.tolist())
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


class ImageDetector:
    """Images of the classifier's own size."""

    def __init__(self, classifier: DigitClassifier):
        self.classifier, self.width = classifier, classifier.head.in_features

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Detection:
        features, logits = self.classifier(samples)
        return Detection(features, logits.argmax(1))


class ClipDetector:
    """Clips (B, 1, T, H, W): each frame cut out around its digit; features and class are the mean over the frames."""

    def __init__(self, classifier: DigitClassifier):
        self.classifier, self.width = classifier, classifier.head.in_features

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Detection:
        frames = samples.transpose(1, 2).flatten(0, 1)  # (B·T, 1, H, W)
        features, logits = (part.unflatten(0, (len(samples), -1)) for part in self.classifier(centred(frames)))
        label = logits.softmax(-1).mean(1).argmax(1)
        return Detection(features.mean(1), label, (logits.argmax(-1) == label[:, None]).all(1))


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
