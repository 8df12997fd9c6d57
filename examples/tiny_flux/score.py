"""What a tiny Flux is worth at each budget: accuracy of its samples, and time.

    python examples/tiny_flux/score.py runs/tiny-flux                          # the original
    python examples/tiny_flux/score.py runs/tiny-flux --elastic runs/dial      # with the add-on

Accuracy: the share of samples that a small convolutional network, trained here on Fashion-MNIST, gives the class that
was asked for. It is right on about 0.89 of real test pictures.
"""

import argparse
import json
import time
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from captions import CLASSES, SIZE, captioned_images
from torch import Tensor, nn

import elit

CLASSIFIER = "classifier.pt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--elastic", default=None, help="folder or hub name of the add-on")
    parser.add_argument("--untrained", action="store_true", help="put in the interface, as it is before distillation")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0, 0.5, 0.25, 0.125])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=1.0, help="true_cfg_scale")
    parser.add_argument("--picture", type=Path, default=None, help="a PNG with the first samples, a row a budget")
    arguments = parser.parse_args()
    classifier = load_classifier(arguments.pipeline.parent / CLASSIFIER)
    pipe = diffusers.FluxPipeline.from_pretrained(arguments.pipeline)
    pipe.set_progress_bar_config(disable=True)
    if arguments.elastic:
        elit.load_elastic(pipe, arguments.elastic)
    elif arguments.untrained:
        elit.elastify(pipe.transformer, read_after=1, write_after=7, window=(4, 4))
    budgets = arguments.budgets if arguments.elastic or arguments.untrained else [1.0]
    reference, rows = None, []
    for budget in budgets:
        start = time.perf_counter()
        with elit.budget(budget):
            images, labels = draw(pipe, arguments)
        seconds = time.perf_counter() - start
        reference = images if reference is None else reference
        with torch.no_grad():
            right = (classifier(images).argmax(1) == labels).float().mean().item()
        error = (images - reference).square().mean().sqrt().item()
        rows.append((budget, right, error, seconds))
        print(
            f"{budget:6.1%}  accuracy {right:.3f}  distance to the first row {error:.4f}  {seconds:.1f} s", flush=True
        )
        if arguments.picture:
            picture(images[:20], arguments.picture.with_stem(f"{arguments.picture.stem}-{budget}"))
    print(json.dumps([dict(zip(("budget", "accuracy", "distance", "seconds"), row, strict=True)) for row in rows]))


def draw(pipe: diffusers.FluxPipeline, arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """images (count, 3, SIZE, SIZE) in [-1, 1] of all classes in turn, always of the same seeds."""
    labels, images = torch.arange(arguments.count) % len(CLASSES), []
    for number, part in enumerate(labels.split(100)):
        given = {"negative_prompt": [""] * len(part), "true_cfg_scale": arguments.guidance}
        drawn = pipe(
            [f"a photo of a {CLASSES[label]}" for label in part],
            height=SIZE, width=SIZE, max_sequence_length=8, num_inference_steps=arguments.steps, output_type="pt",
            generator=torch.Generator().manual_seed(number), **(given if arguments.guidance != 1 else {}),
        ).images  # fmt: skip
        images.append(drawn * 2 - 1)
    return torch.cat(images).float(), labels


def load_classifier(path: Path) -> nn.Module:
    """A convolutional network, trained the first time (a minute) and kept beside the pipeline."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
            *(nn.Flatten(), nn.Dropout(0.2), nn.Linear(512, len(CLASSES))),
        )
        if not path.is_file():
            fit(network)
            torch.save(network.state_dict(), path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
    network.load_state_dict(torch.load(path))
    return network.eval()


def fit(network: nn.Module, steps: int = 800) -> None:
    images, labels = captioned_images()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for step in range(steps):
        row = torch.randint(len(images), (128,))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(network(images[row]).float(), labels[row])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, labels = captioned_images("t10k")
    with torch.no_grad():
        right = torch.cat([network.eval()(part).argmax(1) for part in images.split(1000)]) == labels
    print(f"classifier: accuracy {right.float().mean():.3f} on the test set", flush=True)


def picture(images: Tensor, path: Path) -> None:
    from elit.data.images import image_grid, save_image

    save_image(image_grid(images, 10, scale=4), path)


if __name__ == "__main__":
    main()
