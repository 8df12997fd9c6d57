"""The detector for Fashion-MNIST: a small classifier, trained on its training split and kept in the package."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from elit.data.images import ImageSet
from elit.evaluate.features import Detection
from elit.files import replacing
from elit.models.saved import weights_digest
from elit.pretrained import HERE

WEIGHTS = HERE / "fashion" / "detector" / "classifier.safetensors"
REFERENCE = WEIGHTS.with_name("test-statistics.safetensors")
SIZE = 32


class FashionClassifier(nn.Module):
    """Three convolutions and two linear layers; its features are the 64 units before the last layer."""

    def __init__(self, num_classes: int = 10, features: int = 64):
        super().__init__()
        self.body = nn.Sequential(
            *_stage(1, 32),
            *_stage(32, 64),
            *_stage(64, 128),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(128 * 4, features),
            nn.ReLU(),
        )
        self.head = nn.Linear(features, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 1, 32, 32) in [-1, 1] -> features (B, 64), logits (B, classes)."""
        features = self.body(images)
        return features, self.head(features)


def _stage(channels: int, width: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)


def train_fashion_classifier(
    data: ImageSet, *, epochs: int = 10, batch_size: int = 128, learning_rate: float = 4e-3, seed: int = 0
) -> FashionClassifier:
    """Trains on `data`, mirrored and shifted by a pixel at random, under a one-cycle learning rate, in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FashionClassifier(len(data.classes)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    steps = len(data) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(data), generator=generator)[: steps * batch_size].view(steps, -1):
            images, labels = data.__getitems__(rows.tolist())
            row, column = torch.randint(-1, 2, (2,), generator=generator).tolist()
            images = images.roll((row, column), (2, 3))  # the border is padding
            mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(torch.where(mirrored, images.flip(3), images))[1]
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: FashionClassifier, data: ImageSet, batch_size: int = 500) -> float:
    """Share of the pictures whose class the classifier sees."""
    correct = 0
    for rows in torch.arange(len(data)).split(batch_size):
        images, labels = data.__getitems__(rows.tolist())
        correct += int((model(images)[1].argmax(1) == labels).sum())
    return correct / len(data)


def save_classifier(model: FashionClassifier, path: Path) -> None:
    """Half precision, whole or not at all."""
    floats = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(floats, temporary)


class FashionDetector:
    """Fréchet distance on the classifier's 64 features, the class it sees, precision and recall; 32×32 pictures.

    Of three channels the first. weights: by default the ones in the package.
    """

    name, distance = "fashion-mnist", "fd"
    offers: tuple[str, ...] = ("fd", "accuracy", "is", "kid", "precision", "recall")
    default: tuple[str, ...] = ("fd", "accuracy", "precision", "recall")

    def __init__(self, weights: Path = WEIGHTS, device: torch.device | str = "cpu"):
        state = load_file(weights)
        self.classifier = FashionClassifier(len(state["head.bias"]))
        self.classifier.load_state_dict(state)
        self.classifier.eval().requires_grad_(False).to(device)
        self.width, self.device = self.classifier.head.in_features, torch.device(device)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "weights": weights_digest(self.classifier), "input": f"{SIZE}×{SIZE} grey"}

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Detection:
        if samples.shape[2:] != (SIZE, SIZE):
            raise ValueError(
                f"detector='{self.name}': takes {SIZE}×{SIZE} pictures; these are {tuple(samples.shape[2:])}"
            )
        features, logits = self.classifier(samples[:, :1].to(self.device))
        return Detection(features, logits.argmax(1), logits=logits)
