"""Trains the detector for Fashion-MNIST and writes it into the package: some minutes on one core.

    python studies/fashion/detector.py

Prints its accuracy on the 10,000 test pictures, half precision as saved.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from elit.data.builtin import fashion_mnist
from elit.data.images import ImageSet
from elit.evaluate.detectors import FASHION, Classifier, FashionDetector, picture_classifier
from elit.files import replacing


def train_fashion_classifier(
    data: ImageSet, *, epochs: int = 10, batch_size: int = 128, learning_rate: float = 4e-3, seed: int = 0
) -> Classifier:
    """Trains on `data`, mirrored and shifted by a pixel at random, under a one-cycle learning rate, in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = picture_classifier().train()
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
def accuracy(model: Classifier, data: ImageSet, batch_size: int = 500) -> float:
    """Share of the pictures whose class the classifier recognises."""
    correct = 0
    for rows in torch.arange(len(data)).split(batch_size):
        images, labels = data.__getitems__(rows.tolist())
        correct += int((model(images)[1].argmax(1) == labels).sum())
    return correct / len(data)


def save_classifier(model: Classifier, path: Path) -> None:
    """Half precision, whole or not at all."""
    floats = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(floats, temporary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FASHION)
    args = parser.parse_args()
    torch.set_num_threads(1)
    save_classifier(train_fashion_classifier(fashion_mnist("train")), args.out)
    share = accuracy(FashionDetector(args.out).classifier, fashion_mnist("test"))
    print(f"accuracy on the test split: {share:.4f} -> {args.out}")


if __name__ == "__main__":
    main()
