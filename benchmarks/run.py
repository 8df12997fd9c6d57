"""How fast `elit` is, each part measured in one run against what it should be; `run.py PART --help` has the settings.

    python benchmarks/run.py forward      # time against FLOPs at every budget, beside the plain DiT; utilisation
    python benchmarks/run.py training     # the same for a step of training, and its peak memory
    python benchmarks/run.py guidance     # what CCFG and AG save of CFG's wall-clock
    python benchmarks/run.py naive        # against full-length tensors and masks: outputs, throughput, memory
    python benchmarks/run.py mixed        # a batch of many budgets, against padding to the largest
    python benchmarks/run.py forward --sizes XL --device cuda --dtype bfloat16 --compile

`spread` is (slowest − fastest) / median over the rounds. Exit code 2 for bad input, 1 where outputs are not equal.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that counts memory is silent

import against_cfg
import against_flops
import against_naive
import against_padding
import torch

import elit
from elit.evaluate.tables import print_table
from elit.files import write_text


class Part(NamedTuple):
    """One benchmark: rows and what they come to, from its options."""

    about: str
    options: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace], tuple[list[dict[str, Any]], dict[str, Any]]]
    says: Callable[[dict[str, Any]], list[str]]


PARTS = {
    "forward": Part(against_flops.__doc__ or "", against_flops.options, against_flops.forward, against_flops.says),
    "training": Part(against_flops.__doc__ or "", against_flops.options, against_flops.training, against_flops.says),
    "guidance": Part(against_cfg.__doc__ or "", against_cfg.options, against_cfg.guidance, against_cfg.says),
    "naive": Part(against_naive.__doc__ or "", against_naive.options, against_naive.naive, against_naive.says),
    "mixed": Part(against_padding.__doc__ or "", against_padding.options, against_padding.mixed, against_padding.says),
}
QUICK = {
    "rounds": 1,
    "sizes": ["S"],
    "size": "S",
    "shapes": ["S:1-2-1"],
    "sample_sizes": [16],
    "sample_size": 16,
    "batch_sizes": [2],
    "batch_size": 2,
    "budgets": 2,
    "steps": 1,
    "draws": 1,
    "matrix": 64,
}
QUICK_NETWORK = {"hidden_size": 48, "num_heads": 4, "depth": 4}  # as deep as QUICK's shape


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(line: Sequence[str] | None = None) -> int:
    line = sys.argv[1:] if line is None else line
    args = parse(line)
    start = time.perf_counter()
    try:
        check(args)
        rows, summary = PARTS[args.part].measure(args)
    except ValueError as error:
        print(f"run.py {args.part}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except ArithmeticError as error:
        print(f"run.py {args.part}: {error}", file=sys.stderr)
        return 1
    print(f"{hardware(args.device)}, torch {torch.__version__}, {dtype_name(args)}, median of {args.rounds} rounds")
    columns = list(rows[0])
    print_table(columns, [[cell(row[key]) for key in columns] for row in rows])
    print(*PARTS[args.part].says(summary), sep="\n")
    if args.out:
        seconds = round(time.perf_counter() - start)
        write_text(args.out, as_text(record(args, line, seconds, summary, rows)))
    return 0


def parse(line: Sequence[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="run.py", description=__doc__, formatter_class=raw)
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART", parser_class=Parser)
    for name, part in PARTS.items():
        one = parts.add_parser(name, help=part.about.splitlines()[0], description=part.about, formatter_class=raw)
        part.options(one)
        one.add_argument("--rounds", type=int, default=5, help="in which all cases take turns, after one to warm up")
        one.add_argument("--in-channels", type=int, default=4)
        one.add_argument("--device", default="cpu")
        one.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
        one.add_argument("--compile", action="store_true")
        one.add_argument(
            "--out", type=Path, metavar="FILE.json", help="write it all down: benchmarks/results/NAME.json"
        )
        one.add_argument("--quick", action="store_true", help="a tiny network, in seconds: does it run at all?")
        if "--quick" in line:
            known = vars(one.parse_args([]))
            one.set_defaults(**{key: value for key, value in QUICK.items() if key in known})
    args = parser.parse_args(line)
    args.overrides = QUICK_NETWORK if args.quick else {}
    return args


def check(args: argparse.Namespace) -> None:
    """Turns device and dtype into torch's own. Raises ValueError, before anything is measured, for what cannot be."""
    for name, value in vars(args).items():
        counts = value if isinstance(value, list) else [value]
        if any(type(count) is int and count < 1 for count in counts):
            raise ValueError(f"--{name.replace('_', '-')}: give at least 1")
    try:
        args.device, args.dtype = torch.device(args.device), getattr(torch, args.dtype)
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {args.device}: there is none here; give cpu, or cuda where there is one") from None
    if args.out and args.out.is_dir():
        raise ValueError(f"--out {args.out}: a folder; give a file")


def record(
    args: argparse.Namespace, line: Sequence[str], seconds: int, summary: dict[str, Any], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    own = {"part", "out", "overrides", "device", "dtype"}
    settings = {key: value for key, value in vars(args).items() if key not in own}
    return {
        "command": shlex.join(["python", "benchmarks/run.py", *line]),
        "versions": {"elit": elit.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "hardware": hardware(args.device),
        "settings": {"device": str(args.device), "dtype": dtype_name(args)} | settings,
        "seconds": seconds,
        "summary": summary,
        "rows": rows,
    }


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.get_num_threads()} threads"


def dtype_name(args: argparse.Namespace) -> str:
    return str(args.dtype).removeprefix("torch.")


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def as_text(content: dict[str, Any]) -> str:
    """JSON with a row a line and six digits, so that a change shows in a diff."""
    plain = json.loads(json.dumps(content, ensure_ascii=False), parse_float=lambda text: float(f"{float(text):.6g}"))
    rows = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in plain.pop("rows"))
    fields = [f' "{key}": {json.dumps(value, ensure_ascii=False)}' for key, value in plain.items()]
    return "{\n" + ",\n".join([*fields, f' "rows": [\n{rows}\n ]']) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
