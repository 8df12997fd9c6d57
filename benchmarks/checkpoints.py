"""The time that a step waits for its checkpoint, written at once and in the background (`async_checkpoints`).

    python benchmarks/checkpoints.py --folder /tmp

Both take turns in one run; the fastest of each counts. The first save in the background also gets its memory.
"""

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp

import torch
from accelerate import Accelerator

import elit
from elit.config import TrainConfig
from elit.training.checkpoint import AveragedWeights, CheckpointWriter, RunState
from elit.training.loop import make_optimizers, optimizer_step


def main(line: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ELIT-DiT-S/2", help="a preset")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    args = parser.parse_args(line)
    accelerator, out = Accelerator(), mkdtemp(dir=args.folder)
    network = elit.create_model(args.model, in_channels=4).to(accelerator.device)
    plain, threaded = (TrainConfig(out=out, async_checkpoints=each, keep_last=1) for each in (False, True))
    optimizers = make_optimizers(plain, network, network.blocks)
    for weight in network.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer_step(optimizers, 1e-3, torch.ones((), device=accelerator.device))
    state = RunState(network, optimizers, [AveragedWeights(network, 0.9)])
    times: dict[bool, list[float]] = {False: [], True: []}
    writers = [CheckpointWriter(accelerator, state, config, {}) for config in (plain, threaded)]
    try:
        for step in range(2 * args.rounds + 2):
            writer = writers[step % 2]
            start = time.perf_counter()
            writer.save(step)
            times[writer.config.async_checkpoints].append(time.perf_counter() - start)
            writer.wait()
    finally:
        shutil.rmtree(out)
    millions = sum(weight.numel() for weight in network.parameters()) / 1e6
    at_once, waiting = (min(times[each][1:]) for each in (False, True))
    print(f"{args.model}, {millions:.1f}M weights, on {accelerator.device}; {torch.get_num_threads()} threads")
    print(f"at once {at_once:.3f} s, in the background {waiting:.3f} s: ratio {waiting / at_once:.3f}")
    print(f"first save in the background: {times[True][0]:.3f} s")


if __name__ == "__main__":
    main()
