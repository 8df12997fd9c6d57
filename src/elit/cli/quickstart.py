"""elit quickstart"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elit.cli.main import parse as parse_arguments


@dataclass(frozen=True, kw_only=True)
class Args:
    """Train a small multi-budget ELIT-DiT on scikit-learn's digits, sample it at every budget, score the samples and
    write a report. Takes about two minutes on two CPU cores and needs no download.

    Example: elit quickstart --out runs/quickstart
    """

    out: Path = Path("runs/quickstart")
    """Folder for model/, config.yaml, results.json, the pictures and report.html; an earlier quickstart there goes."""
    steps: int = 700
    """Training steps."""
    seed: int = 0
    """Seed of everything; the same seed on the same machine gives the same numbers."""
    json: bool = False
    """Print results.json's content last on stdout."""


def parse(arguments: Sequence[str]) -> Args:
    return parse_arguments(Args, "quickstart", arguments)


def run(args: Args) -> dict[str, Any]:
    import sys

    from elit.quickstart import quickstart
    from elit.report.tables import HEADINGS, print_table, score_cells

    result = quickstart(args.out, steps=args.steps, seed=args.seed, say=lambda line: print(line, file=sys.stderr))
    if not args.json:
        print_table(HEADINGS, [score_cells(score) for score in result.scores])
        print(f"Report: {result.report}  ({result.seconds:.0f} s)")
    return result.results()
