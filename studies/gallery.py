"""The gallery page of the docs: docs/gallery.md and its pictures, from the model in the box.

    python studies/gallery.py

Each picture holds its settings: `elit sample --like` makes it again.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from elit.elastic.engine import load_engine
from elit.files import replacing
from elit.flow.guidance import CCFG, CFG
from elit.pretrained import model_folder
from elit.sampling.engine import take
from elit.sampling.pictures import Subject, encode_picture, image_grid, make_record
from elit.sampling.settings import Sampling

PAGE = Path(__file__).parents[1] / "docs" / "gallery.md"
SEEDS = 3
ROWS = (
    ("All latents", Sampling(budget="100%")),
    ("A quarter of them", Sampling(budget="25%")),
    ("One latent a window", Sampling(budget=1)),
    ("A quarter, then all", Sampling(budget="25%@0-0.5,100%@0.5-1")),
    ("All, CFG 2", Sampling(budget="100%", guidance=CFG(2.0))),
    ("All, CCFG 2 with one latent", Sampling(budget="100%", guidance=CCFG(2.0, 1))),
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
    engine = load_engine(model_folder(args.model), name=args.model)
    names = engine.classes
    labels = tuple(map(str, range(len(names))))
    rows, subject = range(SEEDS * len(names)), Subject(labels=labels, count=SEEDS * len(names))
    page = [INTRO.format(model=args.model, steps=STEPS)]
    for title, row in ROWS:
        sampling = replace(row, steps=STEPS, dtype="float32")
        run = engine.begin(take(engine.conditions(labels), rows), rows, sampling)
        while not run.done:
            run.step()
        name = title.lower().replace(",", "").replace(" ", "-") + ".png"
        grid = image_grid(run.pictures().clamp(-1, 1), len(names), scale=2)
        with replacing(args.page.parent / "gallery" / name) as temporary:
            temporary.write_bytes(encode_picture([grid], ".png", make_record(engine, sampling, subject).to_text()))
        gflops = engine.gflops(sampling)
        page.append(f"## {title}\n\n{gflops:.3g} GFLOPs. {', '.join(names)}.\n\n![{title}](gallery/{name})\n")
        print(f"{title}: {gflops:.3g} GFLOPs")
    with replacing(args.page) as temporary:
        temporary.write_text("\n".join(page), encoding="utf-8")


if __name__ == "__main__":
    main()
