"""Tells which of diffusers' pipelines, and what is set on them, work with the dial: the table of docs/pipelines.md.

Each runs on a stock pipeline of tiny random parts: the plain one, the elastified one at full budget, which has to give
the same, at a quarter of the tokens, and with CCFG. The tokens in the core are counted in every forward, and have
to be those of the budget: all of them a quarter; with CCFG a half and one token in turn, in each step. A step cache has
to change what the plain pipeline makes, and is tried with another budget from each of its steps on, up and down. Where
the plain pipeline fails as well, the fault is diffusers'. Takes two minutes of one core. Where torchao is not
installed, its row is left out.

    python studies/pipelines/table.py [--only FluxPipeline] [--out studies/results/pipelines.json]
"""

import argparse
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from mechanisms import MECHANISMS, STEPS, elastic_with, run_of
from parts import PIPELINES, Run, Stock
from torch import Tensor

import elit
from elit.budgets import resolve_budget
from elit.elastic.runtime import Call
from elit.elastic.surgery import Elastic
from elit.files import write_text


class Row(NamedTuple):
    """The outcome of one try; low, guided, switched: tokens a window of its forwards, and how many switches worked."""

    name: str
    result: str
    low: str = ""
    guided: str = ""
    switched: str = ""
    reason: str = ""


class Wrong(Exception):
    """What a run gave is not what it has to be."""


def transformers_of(pipe: Any) -> list[Any]:
    return [part for part in pipe.components.values() if isinstance(part, Elastic)]


@contextmanager
def counted() -> Iterator[list[int]]:
    """The tokens a window that the last block before Write gets in each forward; of a batch with both branches, two."""
    seen: list[int] = []
    enter = Call.enter

    @torch.compiler.disable(recursive=False)
    def noted(call: Call, block: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        given = enter(call, block, arguments)
        if block.writes:
            budget, cuts = call.kept.grids[0].budget, [grid.windows for grid in call.kept.grids]
            counts = [
                number * j for cut in cuts for (_, number), j in zip(cut.shapes, cut.latents(budget), strict=True)
            ]
            before = call.before if isinstance(call.before, int) else 0
            length = given[call.family.tokens].shape[1] - (max(call.others, before) if block.joined else 0)
            if length != sum(counts):
                raise Wrong(f"a core of {length} tokens at a budget of {budget}, which are {sum(counts)}")
            seen.append(budget)
        return given

    Call.enter = noted
    try:
        yield seen
    finally:
        Call.enter = enter


def tried(
    name: str, plain: Callable[[], Any], elastic: Callable[[], Any], run: Run, exact: bool, forwards: int, steps: int
) -> Row:
    """forwards: of a step; steps: of a run with a cache, in which the budget switches; 0 for none."""
    row, right = Row(name, "FAILS"), None
    try:
        right = run(plain())
    except Exception as error:  # whatever stops diffusers is the finding
        fault = said(error)
    try:
        pipe = elastic()
        full = run(pipe)
    except Exception as error:
        if right is None and said(error) == fault:
            return row._replace(result="fails in diffusers, without the dial too", reason=fault)
        return row._replace(result="refused" if isinstance(error, ValueError) else "FAILS", reason=said(error))
    if right is None:
        return row._replace(result="fails in diffusers, without the dial", reason=fault)
    same = torch.equal(full, right) if exact else torch.allclose(full, right, atol=1e-4)
    if not same:
        return row._replace(result="DIFFERS", reason=f"at full budget by up to {(full - right).abs().max():.2g}")
    works = "works"
    for column, attempt in (("low", low), ("guided", guided), ("switched", switched)):
        try:
            if column != "switched" or steps:
                row = row._replace(**{column: attempt(pipe, run, full, forwards, steps)})
        except (ValueError, Wrong) as error:
            if isinstance(error, Wrong):
                return row._replace(result="FAILS", reason=said(error))
            without = {"low": "at full budget alone", "guided": "works, without CCFG", "switched": "works, no switch"}
            works, reason = without[column] if works == "works" else f"{works}, no switch", said(error)
            row = row._replace(reason=f"{row.reason}; {reason}" if row.reason else reason, **{column: "refused"})
            if column == "low":
                break
        except Exception as error:
            return row._replace(result="FAILS", reason=said(error))
    return row._replace(result=works)


def low(pipe: Any, run: Run, full: Tensor, forwards: int, steps: int) -> str:
    wanted = resolve_budget(0.25, transformers_of(pipe)[0].budgets)
    with counted() as seen, elit.budget(0.25):
        picture = run(pipe)
    check(picture, full)
    if {*seen} != {wanted}:
        raise Wrong(f"ran at {seen}, not at {wanted}")
    return f"{len(seen)} × {wanted}"


def guided(pipe: Any, run: Run, full: Tensor, forwards: int, steps: int) -> str:
    wanted = resolve_budget(0.5, transformers_of(pipe)[0].budgets)
    with counted() as seen, elit.budget(0.5, guidance=1):
        picture = run(pipe)
    check(picture, full)
    turns = [sorted(seen[first : first + forwards]) for first in range(0, len(seen), forwards)]
    right = turns == [[1] + [wanted] * (forwards - 1)] * len(turns)
    if {*seen} != {wanted, 1} or not (right or steps):  # a cache skips forwards as it likes
        raise Wrong(f"ran at {seen}, not once a step at 1 and else at {wanted}")
    return ", ".join(map(str, seen[:4])) + (", …" if len(seen) > 4 else "")


def switched(pipe: Any, run: Run, full: Tensor, forwards: int, steps: int) -> str:
    """Another budget from each step on, up and down."""
    budgets = transformers_of(pipe)[0].budgets
    ends, done = (resolve_budget(0.25, budgets), resolve_budget(0.5, budgets)), 0
    for one, other in (ends, ends[::-1]):
        for step in range(1, steps):
            try:
                with counted() as seen, elit.budget([one] * step + [other] * (steps - step)):
                    picture = run(pipe)
            except ValueError:
                pipe.maybe_free_model_hooks()
                raise
            check(picture, full)
            if not {*seen} <= {*ends} or one not in seen:
                raise Wrong(f"ran at {seen} where {one} becomes {other} behind step {step}")
            done += 1
    return f"{done} of {2 * (steps - 1)}"


def check(picture: Tensor, full: Tensor) -> None:
    if not picture.isfinite().all():
        raise Wrong("not finite")
    if torch.equal(picture, full):
        raise Wrong("a lower budget changes nothing")


def said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def elastic_from(stock: Stock) -> Any:
    return elit.elastify(stock.make())


def try_all(only: str) -> list[Row]:
    rows = []

    def add(name: str, *given: Any) -> None:
        rows.append(tried(name, *given))
        print(*rows[-1], sep=" | ", flush=True)

    for name, stock in PIPELINES.items():
        if only in name:
            add(name, stock.make, partial(elastic_from, stock), stock.run, True, stock.forwards, 0)
    for name, mechanism in MECHANISMS.items():
        if only in name:
            run = run_of(mechanism)

            def plain(mechanism: Any = mechanism, run: Run = run) -> Any:
                pipe = PIPELINES[mechanism.pipeline].make()
                before = run(pipe) if mechanism.switched else None
                mechanism.set(pipe)
                if before is not None and torch.equal(run(pipe), before):
                    raise Wrong("the cache changes nothing")
                return pipe

            steps = STEPS if mechanism.switched else 0
            add(name, plain, partial(elastic_with, mechanism), run, mechanism.exact, 2, steps)
    return rows


def as_markdown(rows: list[Row]) -> str:
    lines = ["| tried | result | 25% | CCFG, 50% and 1 | switches | why |", "|---|---|---|---|---|---|"]
    lines += [f"| {' | '.join(each.replace('|', '/') for each in row)} |" for row in rows]
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
