"""Writes the tables of docs/reproduction.md from studies/results/*.json.

    python studies/summary.py            # rewrites them
    python studies/summary.py --check    # exit 1 if they are not up to date

In the document a table stands between `<!-- claim2 -->` and `<!-- /claim2 -->`; everything outside is written by hand.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elit.files import write_text

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "studies" / "fashion"))
import report  # noqa: E402

DOCUMENT, RESULTS = ROOT / "docs" / "reproduction.md", ROOT / "studies" / "results"
FIGURES = ROOT / "docs" / "figures"
VERDICTS = {"holds": "holds", "does not hold": "does not hold at this size", "undecided": "undecided"}
DECIMALS = {"loss": 4, "FD": 1, "accuracy": 3, "GFLOPs": 3}  # of a metric; 3 otherwise
Result = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """A row of the first table."""

    says: str
    paper: str
    """The paper's figure or table, and its number where there is one."""
    numbers: tuple[tuple[str, str], ...]
    """(arm, metric) of the numbers that stand for ours."""


CLAIMS = {
    1: Claim(
        "Zero padding to 4× the tokens gives DiT nothing; ELIT uses the extra tokens",
        "Fig. 2",
        (("DiT", "loss"), ("DiT, padded", "loss"), ("ELIT", "loss"), ("ELIT, padded", "loss")),
    ),
    2: Claim(
        "Tail drop beats random drop at low budgets",
        "Tab. 4c: FID 36.3 against 38.6 at 25%",
        (("tail drop, 4 of 16", "FD"), ("random drop, first, 4 of 16", "FD"), ("random drop, redrawn, 4 of 16", "FD")),
    ),
    3: Claim(
        "A middle window beats no grouping and windows of one token",
        "Tab. 4a: 4×4 best at 16×16 tokens, 8×8 at 32×32",
        tuple((f"windows of {side}×{side}", "FD") for side in (8, 4, 1)),
    ),
    4: Claim(
        "Two thirds of the blocks in the core is best; no head and no tail is clearly worse",
        "Tab. 4b: best at 67–71%",
        (("0–6–0", "FD"), ("1–4–1", "FD"), ("2–2–2", "FD")),
    ),
    5: Claim(
        "One multi-budget network beats separately trained ones at every budget",
        "Tab. 8",
        tuple((f"{kind}, {budget} of 16", "FD") for budget in (16, 4) for kind in ("joint", "separate")),
    ),
    6: Claim(
        "At equal FLOPs fewer tokens beat fewer steps; CCFG ≥ CFG at a third less cost, and saturates sooner",
        "Fig. 8, 14; Fig. 5; Fig. 15",
        (
            *(("4 of 16, 16 steps", "FD"), ("16 of 16, 8 steps", "FD")),
            *((f"{kind}, scale 1.5", metric) for metric in ("FD", "GFLOPs") for kind in ("CFG", "CCFG", "AG")),
        ),
    ),
    7: Claim(
        "Read attends where the loss is high; early latents broadly, late ones sparsely",
        "Fig. 2, 12",
        (("all times", "attention and loss"), ("early latents", "entropy"), ("late latents", "entropy")),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the tables are not up to date")
    args = parser.parse_args()
    before = DOCUMENT.read_text(encoding="utf-8")
    fashion = report.load(RESULTS / "fashion")
    after = filled(before, load(RESULTS), fashion)
    if args.check:
        sys.exit(
            f"{DOCUMENT.relative_to(ROOT)}: not up to date; run python studies/summary.py" if before != after else 0
        )
    write_text(DOCUMENT, after)
    for name, result in fashion.items():
        report.plot_curves(result, FIGURES / f"fashion-{name}.png")


def load(folder: Path) -> dict[int, Result]:
    """The results that are there, by the claim's number."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("claim*.json"))]
    return {result["claim"]: result for result in results}


def filled(document: str, results: dict[int, Result], fashion: dict[str, Result]) -> str:
    """The document with its tables from the results on digits and on Fashion-MNIST."""
    tables = {"summary": summary(results)} | {f"claim{n}": section(n, results.get(n)) for n in CLAIMS}
    tables["fashion-summary"] = table(["study", "paper", "verdict", "in parts"], report.summary(fashion))
    tables |= {f"fashion-{name}": fashion_section(name, fashion.get(name)) for name in report.ABOUT}
    for name, text in tables.items():
        place = re.fullmatch(rf"(.*<!-- {name} -->\n).*?(<!-- /{name} -->.*)", document, flags=re.DOTALL)
        if place is None:
            raise ValueError(f"{DOCUMENT.name}: no place for {name}, between <!-- {name} --> and <!-- /{name} -->")
        document = f"{place[1]}\n{text}\n\n{place[2]}"
    return document


def summary(results: dict[int, Result]) -> str:
    """A row a claim: what it says, the paper's figure, ours, the verdict."""
    rows = []
    for number, claim in CLAIMS.items():
        result = results.get(number)
        link = f"[{number}](#claim-{number})"
        if result is None:
            rows.append([link, claim.says, claim.paper, "not run yet", "undecided"])
            continue
        by_arm = {(row["arm"], row["metric"]): row for row in result["rows"]}
        ours = "<br>".join(f"{arm}: {metric} {mean_and_spread(by_arm[arm, metric])}" for arm, metric in claim.numbers)
        rows.append([link, claim.says, claim.paper, ours, f"**{VERDICTS[result['verdict']]}**"])
    return table(["", "claim", "paper", "ours", "verdict"], rows)


def section(number: int, result: Result | None) -> str:
    """The command of a claim, its parts with their verdicts, and all that was measured."""
    if result is None:
        return "Not run yet."
    settings, versions, seeds = result["settings"], result["versions"], result["seeds"]
    parts = [
        [part["says"], f"{part['mean']:+.3g} ± {part['standard_error'] or float('nan'):.2g}", VERDICTS[part["verdict"]]]
        for part in result["parts"]
    ]
    arms = [
        [name, str(arm["batch_size"]), f"{arm['training_tflops']:.3g}"] for name, arm in sorted(result["arms"].items())
    ]
    notes = result["notes"][0].upper() + result["notes"][1:]
    partly = "" if len(seeds) == result["asked_seeds"] else f" (of {result['asked_seeds']} asked for)"
    texts = [
        f"`{result['command']}` → [claim{number}.json](../studies/results/claim{number}.json)",
        f"{notes}. {settings['steps']} training steps, {settings['samples']} samples behind an FD, "
        f"{len(seeds)} seeds{partly}; elit {versions['elit']}, torch {versions['torch']}, {result['hardware']}.",
        table(["part", "advantage ± standard error", "verdict"], parts),
        measured(result["rows"]),
        table(["trained", "batch", "training TFLOPs in all"], arms),
    ]
    return "\n\n".join(texts)


def fashion_section(name: str, result: Result | None) -> str:
    """The command of a study on Fashion-MNIST, its parts with their verdicts, its curves and last scores."""
    if result is None:
        return f"Not run yet: `python studies/fashion/{name}.py`."
    versions = result["versions"]
    notes = result["notes"][0].upper() + result["notes"][1:]
    seeds = f"seed{'s' * (len(result['seeds']) > 1)} {', '.join(map(str, result['seeds']))}"
    drawn = f"{result['samples']:,} samples behind an FD, " if any("FD" in row for row in result["rows"]) else ""
    texts = [
        f"`{result['command']}` → [{name}.json](../studies/results/fashion/{name}.json)",
        f"{notes}. {drawn}{seeds}; elit {versions['elit']}, torch {versions['torch']}.",
        table(["part", "advantage ± standard error, seed by seed", "verdict"], report.parts(result)),
        table(*report.finals(result)),
    ]
    if any("pictures" in row for row in result["rows"]):
        texts.append(f"![Fréchet distance over training](figures/fashion-{name}.png)")
    return "\n\n".join(texts)


def measured(rows: list[Result]) -> str:
    """Arms down, metrics across, mean ± standard deviation over the seeds."""
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    cells = {(row["arm"], row["metric"]): mean_and_spread(row) for row in rows}
    return table(["", *metrics], [[arm, *(cells.get((arm, metric), "") for metric in metrics)] for arm in arms])


def mean_and_spread(row: Result) -> str:
    decimals = DECIMALS.get(row["metric"], 3)
    spread = "" if row["std"] is None or row["metric"] == "GFLOPs" else f" ± {row['std']:.{decimals}f}"
    return f"{row['mean']:.{decimals}f}{spread}"


def table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    main()
