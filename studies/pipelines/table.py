"""Tells which of diffusers' pipelines, and what is set on them, work with the dial: the table of docs/pipelines.md.

Each runs on a stock pipeline of tiny random parts: the plain one, the elastified one at full budget, which has to give
the same, at a quarter of the tokens, and with CCFG, which have to be finite and another picture. Where the plain one
fails as well, the fault is diffusers'. Takes about a minute of one core. Where torchao is not installed, its row is
left out.

    python studies/pipelines/table.py [--only FluxPipeline] [--out studies/results/pipelines.json]
"""

import argparse
import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from mechanisms import MECHANISMS, elastic_with, run_of
from parts import PIPELINES, Run, Stock
from torch import Tensor

import elit
from elit.files import write_text


class Row(NamedTuple):
    """The outcome of one try."""

    name: str
    result: str
    reason: str = ""


def tried(name: str, plain: Callable[[], Any], elastic: Callable[[], Any], run: Run, exact: bool = True) -> Row:
    right: Tensor | None = None
    try:
        right = run(plain())
    except Exception as error:  # whatever stops diffusers is the finding
        fault = said(error)
    try:
        pipe = elastic()
        full = run(pipe)
        with elit.budget(0.25):
            low = run(pipe)
        with elit.budget(0.5, guidance=1):
            try:
                guided = run(pipe)
            except ValueError as error:
                if (
                    right is not None
                    and low.isfinite().all()
                    and agree(full, right, exact)
                    and not torch.equal(low, right)
                ):
                    return Row(name, "works, without CCFG", said(error))
                raise
    except Exception as error:
        if right is None and said(error) == fault:
            return Row(name, "fails in diffusers, without the dial too", fault)
        if right is None:
            return Row(name, "refused", said(error))
        if "full" in locals() and agree(full, right, exact):
            return Row(name, "at full budget alone", said(error))
        return Row(name, "refused" if isinstance(error, ValueError) else "FAILS", said(error))
    if right is None:
        return Row(name, "fails in diffusers, without the dial", fault)
    if not agree(full, right, exact):
        return Row(name, "DIFFERS", f"at full budget by up to {(full - right).abs().max():.2g}")
    if not (low.isfinite().all() and guided.isfinite().all()):
        return Row(name, "FAILS", "not finite at a lower budget")
    if torch.equal(low, right) or torch.equal(guided, low):
        return Row(name, "IGNORED", "a lower budget changes nothing")
    return Row(name, "works")


def agree(one: Tensor, other: Tensor, exact: bool) -> bool:
    return torch.equal(one, other) if exact else torch.allclose(one, other, atol=1e-4)


def said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def elastic_from(stock: Stock) -> Any:
    return elit.elastify(stock.make())


def try_all(only: str) -> list[Row]:
    rows = []
    for name, stock in PIPELINES.items():
        if only in name:
            rows.append(tried(name, stock.make, partial(elastic_from, stock), stock.run))
            print(f"{rows[-1].name}: {rows[-1].result} {rows[-1].reason}", flush=True)
    for name, mechanism in MECHANISMS.items():
        if only in name:

            def plain(mechanism: Any = mechanism) -> Any:
                pipe = PIPELINES[mechanism.pipeline].make()
                mechanism.set(pipe)
                return pipe

            rows.append(tried(name, plain, partial(elastic_with, mechanism), run_of(mechanism), mechanism.exact))
            print(f"{rows[-1].name}: {rows[-1].result} {rows[-1].reason}", flush=True)
    return rows


def as_markdown(rows: list[Row]) -> str:
    lines = ["| tried | result | why |", "|---|---|---|"]
    lines += [f"| {row.name} | {row.result} | {row.reason.replace('|', '/')} |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="what has this in its name")
    parser.add_argument("--out", type=Path, help="also write the rows to this file, as JSON")
    args = parser.parse_args()
    diffusers.utils.logging.set_verbosity(50)
    warnings.simplefilter("ignore")
    rows = try_all(args.only)
    print(as_markdown(rows))
    if args.out:
        record = {
            "diffusers": diffusers.__version__,
            "torch": torch.__version__,
            "rows": [row._asdict() for row in rows],
        }
        write_text(args.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
