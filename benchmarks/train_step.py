"""Images a second, data wait and TFLOP/s of real training runs on latents: ELIT-DiT beside DiT of the same size.

    python benchmarks/train_step.py                       # two to four minutes: S/2 on 32×32×4 latents, batch 8
    python benchmarks/train_step.py --size XL --sample-size 64 --in-channels 16 --batch-size 64 --precision bf16

Each run is `elit train` itself, with encoded data on disk, a loader process, the optimizer and the average. The runs
take turns, and the median over their steps is taken without the first four, which warm up. ELIT trains at all of its
budgets; the ratio of FLOPs is that of the steps measured.
"""

import argparse
import json
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets.arrow_writer import ArrowWriter

import elit
from elit.config import ModelConfig, TrainConfig
from elit.data.encode import FEATURES
from elit.training.train import train

SHARDS, ROWS = 4, 128
WINDOW = 4  # steps between readings of the clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S", choices=["S", "B", "L", "XL"])
    parser.add_argument("--sample-size", type=int, default=32)
    parser.add_argument("--in-channels", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12, help="of each run, a multiple of 4")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON last")
    args = parser.parse_args()

    names = [f"DiT-{args.size}/2", f"ELIT-DiT-{args.size}/2"]
    measured: dict[str, list[dict]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "latents"
        write_latents(data, (args.in_channels, args.sample_size, args.sample_size))
        for round_ in range(args.rounds):
            for name in names:
                out = Path(folder) / f"{name.replace('/', '-')}-{round_}"
                train(run_config(name, args, data, out))
                lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
                measured[name] += lines[WINDOW:]

    rows: list[dict[str, Any]] = []
    for name in names:
        figures = {
            key: statistics.median(step[key] for step in measured[name])
            for key in ("images_per_s", "data_wait", "tflops_per_s")
        }
        rows.append({"model": name} | figures)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.precision}", end="")
    print(f", batch {args.batch_size} of {args.sample_size}×{args.sample_size}×{args.in_channels}")
    print(f"{'model':>16} {'images/s':>9} {'data wait':>10} {'TFLOP/s':>9}")
    for row in rows:
        print(f"{row['model']:>16} {row['images_per_s']:9.2f} {row['data_wait']:10.2%} {row['tflops_per_s']:9.4f}")
    plain, elastic = rows
    ratio = plain["images_per_s"] / elastic["images_per_s"]
    flops = mean_flops(names[1], args, measured[names[1]]) / mean_flops(names[0], args, measured[names[0]])
    print(f"{names[1]} over {names[0]}: {ratio:.3f} × the time of a step, {flops:.3f} × the FLOPs")
    if args.json:
        print(json.dumps({"rows": rows, "elit_over_baseline": {"time": ratio, "flops": flops}}))


def run_config(name: str, args: argparse.Namespace, data: Path, out: Path) -> TrainConfig:
    return TrainConfig(
        out=str(out),
        model=ModelConfig(name=name),
        data=str(data),
        steps=args.steps,
        batch_size=args.batch_size,
        precision=args.precision,
        compile=args.compile,
        workers=args.workers,
        preview_every=0,
        log_every=WINDOW,
        checkpoint_every=args.steps,
        budget_min=1 if name.startswith("ELIT") else None,
    )


def mean_flops(name: str, args: argparse.Namespace, steps: list[dict]) -> float:
    """FLOPs of a forward, over the budgets of the measured steps."""
    model = elit.create_model(name, sample_size=args.sample_size, in_channels=args.in_channels)
    return statistics.mean(elit.count_flops(model, budget=step["budget"]) for step in steps)


def write_latents(root: Path, shape: tuple[int, ...]) -> None:
    """A folder as `elit encode` leaves it, of random moments."""
    root.mkdir()
    rng, shards = np.random.default_rng(0), []
    for number in range(SHARDS):
        path = root / f"data-{number:05d}.arrow"
        with ArrowWriter(features=FEATURES, path=str(path)) as writer:
            for row in range(ROWS):
                parts = {name: rng.normal(size=shape).astype(np.float16).tobytes() for name in ("mean", "std")}
                writer.write({"row": number * ROWS + row, "label": row % 10} | parts)
            writer.finalize()
        shards.append({"file": path.name, "rows": ROWS})
    names = [str(number) for number in range(10)]
    vae = {"scaling_factor": 1.0, "shift_factor": 0.0}
    settings = {"classes": names, "caption_texts": names, "shape": shape, "autoencoder": vae}
    (root / "encode.json").write_text(json.dumps(settings))
    (root / "index.json").write_text(json.dumps({"shards": shards}))


if __name__ == "__main__":
    main()
