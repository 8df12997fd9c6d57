"""The gallery page of the docs: docs/gallery.md and its pictures, from the model in the box.

    python studies/gallery.py

Each picture holds its settings: `elit sample --like` makes it again.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from elit.elastic.load import load_model
from elit.files import replacing
from elit.sampling.draw import draw, environment_of, weights_fingerprint
from elit.sampling.evaluations import sampling_flops
from elit.sampling.pictures import encode_picture, image_grid
from elit.sampling.settings import SampleRecord, SampleSettings

PAGE = Path(__file__).parents[1] / "docs" / "gallery.md"
SEEDS = 3
ROWS = (
    ("All latents", SampleSettings(budget="100%")),
    ("A quarter of them", SampleSettings(budget="25%")),
    ("One latent a group", SampleSettings(budget="1")),
    ("A quarter, then all", SampleSettings(budget="25%@0-0.5,100%@0.5-1")),
    ("All, CFG 2", SampleSettings(budget="100%", guidance="cfg", scale=2.0)),
    ("All, CCFG 2 with one latent", SampleSettings(budget="100%", guidance="ccfg", scale=2.0, guidance_budget="1")),
)
STEPS = 16
INTRO = """# Gallery

Pictures of the model in the box, `elit.load_model("{model}")`. `python studies/gallery.py` makes this page.
Each column has one class, each row of a block one seed; only the settings change from block to block. {steps} Euler
steps. The cost is of one picture. Every picture holds its settings: `elit sample --like docs/gallery/FILE.png` repeats
the run.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    model = load_model(args.model).eval()
    weights, environment = weights_fingerprint(model), environment_of(model.device)
    names = model.config.class_names or [str(label) for label in range(model.config.num_classes)]
    words = [INTRO.format(model=args.model, steps=STEPS)]
    for title, row in ROWS:
        settings = replace(row, steps=STEPS, count=SEEDS * len(names), labels=tuple(map(str, range(len(names)))))
        x = draw(model, settings)
        record = SampleRecord(model=args.model, weights=weights, settings=settings, made_with=environment)
        name = title.lower().replace(",", "").replace(" ", "-") + ".png"
        grid = image_grid(x.float().cpu().clamp(-1, 1), len(names), scale=2)
        with replacing(args.page.parent / "gallery" / name) as temporary:
            temporary.write_bytes(encode_picture([grid], ".png", record.to_text()))
        gflops = sampling_flops(model, **settings.arguments()) / 1e9
        words.append(f"## {title}\n\n{gflops:.3g} GFLOPs. {', '.join(names)}.\n\n![{title}](gallery/{name})\n")
        print(f"{title}: {gflops:.3g} GFLOPs")
    with replacing(args.page) as temporary:
        temporary.write_text("\n".join(words), encoding="utf-8")


if __name__ == "__main__":
    with torch.no_grad():
        main()
