"""elit quickstart"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from elit.cli.checks import check_arguments, check_output
from elit.cli.main import parse as parse_arguments


@dataclass(frozen=True, kw_only=True)
class Args:
    """Train a small multi-budget ELIT network on scikit-learn's digits, sample it at every budget, score the samples
    and write a report. Takes two to four minutes on two CPU cores and needs no download.

    Example: elit quickstart --backbone uvit --out runs/uvit
    """

    backbone: Literal["dit", "uvit", "hdit", "mmdit", "video"] = "dit"
    """Kind of network: mmdit draws digits from captions ("a handwritten seven"), video moves them over a canvas."""
    out: Path = Path("runs/quickstart")
    """Folder for model/, config.yaml, results.json, the pictures and report.html."""
    overwrite: bool = False
    """Replace what is there, once the new is whole."""
    steps: int | None = None
    """Training steps; default: as many as the backbone needs."""
    seed: int = 0
    """Seed of everything; the same seed on the same machine gives the same numbers."""
    json: bool = False
    """Print results.json's content last on stdout."""


def parse(arguments: Sequence[str]) -> Args:
    args: Args = parse_arguments(Args, "quickstart", arguments)
    check_arguments(args)
    check_output(args.out)
    return args


def run(args: Args) -> dict[str, Any]:
    import sys

    from elit.cli.quickstart_run import quickstart
    from elit.evaluate.report.tables import headings, print_table, score_cells

    result = quickstart(
        args.out,
        overwrite=args.overwrite,
        backbone=args.backbone,
        steps=args.steps,
        seed=args.seed,
        say=lambda line: print(line, file=sys.stderr),
    )
    if not args.json:
        print_table(headings(result.scores), [score_cells(score) for score in result.scores])
        print(f"Report: {result.report}  ({result.seconds:.0f} s)")
    return result.results()
