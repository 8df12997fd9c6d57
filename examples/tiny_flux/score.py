"""Scores of a tiny Flux at each budget: accuracy of its samples, distance to the original's, and time.

    python examples/tiny_flux/score.py runs/tiny-flux                          # the original
    python examples/tiny_flux/score.py runs/tiny-flux --elastic runs/dial      # with the add-on

Accuracy: the share of samples that `elit evaluate --detector digits` gives the class that was asked for. The detector
is right on 0.995 of the pictures that the pipeline was trained on.
"""

import argparse
import json
import time
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from captions import DIGITS, SIZE
from torch import Tensor

import elit
from elit.evaluate.detectors import open_detector
from elit.sampling.pictures import image_grid, save_frames


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
    detector = open_detector("digits")
    pipe = diffusers.FluxPipeline.from_pretrained(arguments.pipeline)
    pipe.set_progress_bar_config(disable=True)
    if arguments.elastic:
        elit.load_elastic(pipe, arguments.elastic)
    elif arguments.untrained:
        elit.elastify(pipe.transformer, read_after=1, write_after=7, window=(4, 4))
    budgets = arguments.budgets if arguments.elastic or arguments.untrained else [1.0]
    reference, rows, first = None, [], []
    for budget in budgets:
        start = time.process_time()
        with elit.budget(budget):
            images, labels = draw(pipe, arguments)
        seconds = time.process_time() - start
        reference = images if reference is None else reference
        logits = detector(F.avg_pool2d(images.mean(1, keepdim=True), 2)).logits
        right = (logits.argmax(1) == labels).float().mean().item()
        error = (images - reference).square().mean().sqrt().item()
        rows.append((budget, right, error, seconds))
        print(
            f"{budget:6.1%}  accuracy {right:.3f}  distance {error:.4f}  {seconds:.1f} s of processor time", flush=True
        )
        first.append(images[:10])
    if arguments.picture:
        save_frames([image_grid(torch.cat(first), 10, scale=4)], arguments.picture)
    print(json.dumps([dict(zip(("budget", "accuracy", "distance", "seconds"), row, strict=True)) for row in rows]))


def draw(pipe: diffusers.FluxPipeline, arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """images (count, 3, SIZE, SIZE) in [-1, 1] of all classes in turn, always of the same seeds."""
    labels, images = torch.arange(arguments.count) % len(DIGITS), []
    for number, part in enumerate(labels.split(100)):
        given = {"negative_prompt": [""] * len(part), "true_cfg_scale": arguments.guidance}
        drawn = pipe(
            [f"a photo of a {DIGITS[label]}" for label in part],
            height=SIZE, width=SIZE, max_sequence_length=8, num_inference_steps=arguments.steps, output_type="pt",
            generator=torch.Generator().manual_seed(number), **(given if arguments.guidance != 1 else {}),
        ).images  # fmt: skip
        images.append(drawn * 2 - 1)
    return torch.cat(images).float(), labels


if __name__ == "__main__":
    main()
