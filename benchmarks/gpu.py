"""Everything that only a GPU can tell, in one command of at most eight minutes on one H200.

    python benchmarks/gpu.py                              # writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --device cpu --quick         # the same on tiny networks, in seconds: does it run at all?
    python benchmarks/gpu.py forward profile --docs       # some parts; put the tables into docs/inference.md

tests     tests marked `cuda`
forward   DiT-XL/2 beside ELIT-DiT-XL/2 at 256 and 512px and five budgets: images/s, MFU, time against FLOPs
training  the same for a step of training
guidance  time of CCFG against CFG
profile   `elit profile`, and the error of its predictions for runs that it was not fitted to
serving   a burst of requests at `elit serve`, as `elit loadtest` reports it
recipe    `elit train` of the Fashion-MNIST recipe on random images, at a batch that fills the card: images/s

Each part runs in a process of its own with a limit in seconds, so that one that fails does not stop the others. All in
bfloat16 and compiled. MFU is relative to a product of two large matrices in bfloat16. Exit code 1 where a part failed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from run import QUICK_NETWORK, as_text, cell, hardware
from subjects import TrainingStep, evenly, inference, inputs, network
from timing import matrix_product, take_turns
from train_step import write_latents

import elit
from elit.files import write_text

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "inference.md"
MARK = "<!-- from benchmarks/gpu.py -->\n"
Rows = list[dict[str, Any]]
CPU = torch.device("cpu")


def tests(args: argparse.Namespace) -> Rows:
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", "tests"]
    if args.quick:
        command.append("--collect-only")
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stdout[-2000:])
    return [{"result": run.stdout.strip().splitlines()[-1]}]


def forward(args: argparse.Namespace) -> Rows:
    return compare(args, training=False)


def training(args: argparse.Namespace) -> Rows:
    return compare(args, training=True)


def compare(args: argparse.Namespace, *, training: bool) -> Rows:
    """Time and FLOPs of the plain network and of ELIT at five budgets, relative to ELIT's full budget."""
    rows: Rows = []
    product, product_flops = matrix_product(64 if args.quick else 8192, args.device, args.dtype)
    for size in (16,) if args.quick else (32, 64):
        batch = 2 if args.quick else (32 if training else 64) * 32 * 32 // size**2
        cases: dict[Any, Callable[[], object]] = {"product": product}
        flops: dict[Any, float] = {"product": product_flops}
        for name in ("DiT-XL/2", "ELIT-DiT-XL/2"):
            model = network(name, size, args) if training else inference(name, size, args)
            given = inputs(model, batch)
            step = TrainingStep(model, given, args) if training else partial(model, *given)
            for budget in evenly(model.budgets, 2 if args.quick else 5) if model.budgets else (None,):
                cases[name, budget] = partial(step, budget)
                flops[name, budget] = batch * (3 if training else 1) * elit.count_flops(model, budget=budget)
        with torch.set_grad_enabled(training):
            times = take_turns(cases, 1 if args.quick else 5, args.device)
        full = next(case for case in list(cases)[2:])
        peak = product_flops / times["product"].median
        for case in list(cases)[1:]:
            seconds = times[case].median
            rows.append(
                {
                    "model": case[0],
                    "px": 8 * size,
                    "budget": case[1],
                    "images/s": batch / seconds,
                    "MFU": flops[case] / seconds / peak,
                    "time": seconds / times[full].median,
                    "FLOPs": flops[case] / flops[full],
                }
            )
    return rows


def guidance(args: argparse.Namespace) -> Rows:
    size, batch = (16, 2) if args.quick else (32, 16)
    model = inference("ELIT-DiT-XL/2", size, args)
    kinds = {"none": None, "CFG": elit.CFG(1.5), "CCFG": elit.CCFG(1.5, 1), "AG": elit.AG(1.5, 1)}
    run = {name: lambda g=g: elit.sample(model, [0] * batch, steps=4, guidance=g) for name, g in kinds.items()}
    times = take_turns(run, 1 if args.quick else 5, args.device)
    return [
        {"guidance": name, "images/s at 4 steps": batch / time.median, "of CFG": time.median / times["CFG"].median}
        for name, time in times.items()
    ]


def profile(args: argparse.Namespace) -> Rows:
    from elit.planner.profile import measure_profile

    model = inference("ELIT-DiT-B/2", 16 if args.quick else 32, args)
    measured = measure_profile(model, batch_sizes=(1,) if args.quick else (1, 8, 32), seconds=1 if args.quick else 60)
    errors = {name: measured.error(held_out=held) for name, held in (("error of the fit", False), ("held out", True))}
    return [{"runs": len(measured.rows), "rounds": measured.rounds, **errors}]


def serving(args: argparse.Namespace) -> Rows:
    address, seconds = "http://127.0.0.1:8731", 2 if args.quick else 30
    command = [sys.executable, "-m", "elit"]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            [*command, "serve", "fashion", "--port", "8731", "--device", args.device.type], stdout=log, stderr=log
        )
        try:
            load = [*command, "loadtest", address, "--rate", "2" if args.quick else "20", "--seconds", str(seconds)]
            for _ in range(45):
                time.sleep(2)
                run = subprocess.run([*load, "--json"], capture_output=True, text=True)
                if run.returncode == 0:
                    return [json.loads(run.stdout.strip().splitlines()[-1])["summary"]]
            log.seek(0)
            raise RuntimeError(f"{run.stderr}\n{log.read()[-1500:]}")
        finally:
            server.terminate()
            server.wait(40)


def recipe(args: argparse.Namespace) -> Rows:
    batch, steps = (4, 4) if args.quick else (2048, 200)
    with tempfile.TemporaryDirectory() as folder:
        write_latents(Path(folder) / "data", (1, 32, 32))
        line = ["train", "--config", str(ROOT / "recipes/fashion-mnist/elit-dit.yaml"), "--data", f"{folder}/data"]
        line += ["--steps", str(steps), "--batch-size", str(batch), "--out", f"{folder}/run", "--preview-every", "0"]
        line += ["--checkpoint-every", str(steps), "--log-every", "4", "--workers", "0" if args.quick else "8"]
        line.append("--compile" if args.compile else "--no-compile")
        run = subprocess.run([sys.executable, "-m", "elit", *line], capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(run.stderr[-2000:])
        lines = (Path(folder) / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        measured = [json.loads(each) for each in lines][steps // 2 :]
    figures = ("images_per_s", "tflops_per_s", "data_wait")
    return [{"batch": batch} | {key: statistics.median(step[key] for step in measured) for key in figures}]


PARTS = {"tests": 120, "forward": 150, "training": 150, "guidance": 60, "profile": 100, "serving": 150, "recipe": 180}
"""Seconds that each part may take."""


def main(line: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--docs", action="store_true", help=f"replace the tables in {GUIDE.relative_to(ROOT)}")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu.json")
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args(line)
    args.dtype, args.compile, args.in_channels = torch.bfloat16, not args.quick, 4
    args.overrides = QUICK_NETWORK if args.quick else {}
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is none here; give --device cpu --quick for a rehearsal")
    if args.one:
        print(json.dumps(globals()[args.one](args)))
        return 0
    rows: Rows = []
    for part in args.parts or PARTS:
        command = [sys.executable, __file__, "--one", part, "--device", str(args.device), *["--quick"] * args.quick]
        start = time.perf_counter()
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=PARTS[part])
            lines, reason = run.stdout.strip().splitlines(), run.stderr.strip()[-3000:]
            result = {"rows": json.loads(lines[-1])} if run.returncode == 0 else {"failed": reason}
        except subprocess.TimeoutExpired:
            result = {"failed": f"took more than {PARTS[part]} s"}
        rows.append({"part": part, "seconds": round(time.perf_counter() - start, 1), **result})
        print(table(rows[-1]), flush=True)
    about = {"hardware": hardware(args.device), "torch": torch.__version__, "elit": elit.__version__}
    if not args.quick:
        write_text(args.out, as_text({**about, "rows": rows}))
    if args.docs:
        before, _, rest = GUIDE.read_text(encoding="utf-8").partition(MARK)
        text = f"\n{hardware(args.device)}, torch {torch.__version__}, bfloat16, compiled.\n" + "".join(
            map(table, rows)
        )
        write_text(GUIDE, before + MARK + text + "\n" + MARK + rest.partition(MARK)[2])
    return int(any("failed" in row for row in rows))


def table(result: dict[str, Any]) -> str:
    """A part's rows as a table in Markdown."""
    if "failed" in result:
        return f"\n{result['part']} failed after {result['seconds']} s: {result['failed']}\n"
    names = list(result["rows"][0])
    lines = [names, ["---"] * len(names), *([cell(row[name]) for name in names] for row in result["rows"])]
    return f"\n{result['part']} ({result['seconds']} s)\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
