"""Trains the arms of the Fashion-MNIST studies, one after the other; killed and started again, it goes on.

    OMP_NUM_THREADS=1 nice -n 19 python studies/fashion/train.py

An arm sees 300,000 pictures or more, half an hour or so on one core; checkpoints are in runs/fashion.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from runs import ARMS, BATCH_SIZE, ROOT, STEPS, run_config, train

FIRST = ("ELIT multi-budget", "ELIT", "DiT", "ELIT 25%", "random drop")


def main(line: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=FIRST, choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="of the reference arm")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "fashion")
    args = parser.parse_args(line)
    torch.set_num_threads(1)
    for seed in args.seeds:
        for arm in args.arms:
            config = run_config(arm, seed, out=args.out, steps=args.steps, batch_size=args.batch_size)
            if (Path(config.out) / "model").is_dir():
                continue
            start = time.process_time()
            train(arm, config)
            print(f"{arm}, seed {seed}: {time.process_time() - start:,.0f} CPU seconds in this run", flush=True)


if __name__ == "__main__":
    main()
