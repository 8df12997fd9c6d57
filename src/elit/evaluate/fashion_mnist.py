"""The detector for Fashion-MNIST: a small classifier, trained on its training split and kept in the package."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from elit.data.images import ImageSet
from elit.evaluate.features import Classifier, ImageDetector
from elit.files import replacing
from elit.pretrained import HERE

WEIGHTS = HERE / "fashion" / "detector" / "classifier.safetensors"
REFERENCE = WEIGHTS.with_name("test-statistics.safetensors")


class FashionClassifier(Classifier):
    """Three convolutions and two linear layers for 32×32 pictures."""

    def __init__(self, num_classes: int = 10, features: int = 64):
        body = nn.Sequential(
            *_stage(1, 32),
            *_stage(32, 64),
            *_stage(64, 128),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(128 * 4, features),
            nn.ReLU(),
        )
        super().__init__(body, features, num_classes)


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
    """Share of the pictures whose class the classifier recognises."""
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


class FashionDetector(ImageDetector):
    """The classifier in the package, or that of another file of weights."""

    name, size = "fashion-mnist", 32

    def __init__(self, weights: Path = WEIGHTS, device: torch.device | str = "cpu"):
        state = load_file(weights)
        classifier = FashionClassifier(len(state["head.bias"]))
        classifier.load_state_dict(state)
        super().__init__(classifier.eval().requires_grad_(False).to(device))
