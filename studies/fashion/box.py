"""Puts a trained and swept model into the package: weights in half precision, its card, its table, its training log.

    python studies/fashion/box.py runs/fashion-box

The folder is of `elit train --config recipes/fashion-mnist/elit-dit.yaml`; its model has been through `card.py`,
which left README.md and sweep.jsonl beside the weights. The statistics of the test pictures are made here too.
"""

import argparse
import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from elit.config import TrainConfig, load_config
from elit.costs.flops import count_flops
from elit.data.builtin import named_images
from elit.elastic.load import load_model
from elit.evaluate.chunks import Work
from elit.evaluate.detectors import FashionDetector
from elit.evaluate.pictures import open_pictures
from elit.evaluate.reference import FASHION_REFERENCE, measure_reference, save_reference
from elit.files import write_text
from elit.models.saved import checkpoint_step, checkpoints
from elit.pretrained import HERE

LOGGED = 200  # steps whose every loss is in the log that is kept; behind them every hundredth


def main(line: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--box", type=Path, default=HERE / "fashion")
    parser.add_argument(
        "--without-statistics", action="store_true", help="leave the test pictures' statistics as they are"
    )
    args = parser.parse_args(line)
    finished = args.run / "model"
    source = finished if finished.is_dir() else checkpoints(args.run / "checkpoints")[-1]
    config: TrainConfig = load_config(args.run / "config.yaml")
    step = config.steps if source == finished else checkpoint_step(source)

    network = load_model(source)
    data = named_images(config.data)
    assert data is not None
    network.register_to_config(class_names=list(data.classes))
    torch.nn.Module.to(network, torch.float16).save_pretrained(args.box)  # pyrefly: ignore[not-callable]
    rows = [json.loads(row) for row in (args.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    log = {row["step"]: {key: row[key] for key in ("step", "loss", "budget")} for row in rows}
    lines = [json.dumps(row) for n, row in sorted(log.items()) if n <= LOGGED or (n % 100 == 0 and n <= step)]
    write_text(args.box / "training-log.jsonl", "\n".join(lines) + "\n")
    if (finished / "sweep.jsonl").is_file():
        shutil.copyfile(finished / "sweep.jsonl", args.box / "sweep.jsonl")
    card = finished / "README.md"
    if card.is_file():
        write_text(args.box / "README.md", card.read_text(encoding="utf-8") + training_section(args.run, step))
    if not args.without_statistics:
        save_statistics(args.run / "statistics")
    size = sum(file.stat().st_size for file in args.box.rglob("*") if file.is_file())
    print(f"{args.box}: step {step:,}, {step * config.batch_size:,} pictures seen, {size / 2**20:.1f} MiB in all")


def training_section(run: Path, step: int) -> str:
    """How the model was trained, for its card."""
    config: TrainConfig = load_config(run / "config.yaml")
    network = load_model(run / "model" if (run / "model").is_dir() else checkpoints(run / "checkpoints")[-1])
    each = 3 * sum(count_flops(network, budget=budget) for budget in network.budgets) / len(network.budgets)
    pictures = step * config.batch_size
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    # By step, since a resumed run repeats some.
    rates = {row["step"]: row["images_per_s"] for row in rows if row["step"] <= step}
    steps = [0, *sorted(rates)]
    seconds = sum((b - a) * config.batch_size / rates[b] for a, b in itertools.pairwise(steps))
    return f"""
## How it was trained

```bash
elit train --config recipe:fashion-mnist/elit-dit --out runs/fashion-box
python studies/fashion/card.py runs/fashion-box/model
python studies/fashion/box.py runs/fashion-box
```

{step:,} steps of {config.batch_size}, {pictures:,} pictures of the training split of Zalando's Fashion-MNIST (MIT
licence), {each * pictures / 1e15:.2f} PFLOPs at {each / 1e9:.2f} GFLOPs a picture. By its log it took {seconds:,.0f}
seconds, on one or two processor cores that other work shared. The weights are the average with decay
{config.ema_decay}, in half precision. `training-log.jsonl` has the loss of the first {LOGGED} steps, and of every
hundredth.
"""


def save_statistics(work: Path) -> None:
    """The detector's statistics of the 10,000 test pictures."""
    pictures, detector = open_pictures(Path("fashion-mnist")), FashionDetector()
    reference = measure_reference(pictures, detector, Work(out=work, chunk=100, batch_size=1000))
    assert reference is not None  # of the only process
    save_reference(reference, FASHION_REFERENCE)


if __name__ == "__main__":
    main()
