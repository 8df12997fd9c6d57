"""Detectors: networks that turn images into features and class predictions."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elit.data.images import ImageSet


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
