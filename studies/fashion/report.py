"""Tables and plots of the studies on Fashion-MNIST, from studies/results/fashion/*.json."""

import json
from pathlib import Path
from typing import Any

ABOUT = {
    "headline": "DiT, ELIT and multi-budget ELIT at equal training FLOPs",
    "claim2": "Tail drop beats random drop at low budgets",
    "claim4": "Two thirds of the blocks in the core is best",
    "claim5": "One multi-budget network beats separately trained ones",
    "claim6": "Fewer tokens beat fewer steps; CCFG is no worse than CFG at less cost",
    "claim7": "Read attends where the loss is high; early latents broadly, late ones sparsely",
    "dial": "Quality falls gently and monotonically along the dial; schedules and step caching",
    "windows": "Latents are worth more in windows where there is more to draw",
}
PAPER = {
    "headline": "Tab. 1: FID 13.0, 8.2, 7.8",
    "claim2": "Tab. 4c: 36.3 against 38.6 at 25%",
    "claim4": "Tab. 4b: best at 67–71%",
    "claim5": "Tab. 8",
    "claim6": "Fig. 5, 8, 14",
    "claim7": "Fig. 2, 12",
    "dial": "Fig. 4",
    "windows": "not in the paper",
}
METRICS = {"FD": 2, "accuracy": 3, "loss": 4, "GFLOPs": 3, "value": 3}
"""Columns of a row, with their decimals."""
VERDICTS = {"holds": "holds", "does not hold": "does not hold at this size", "undecided": "undecided"}
Result = dict[str, Any]


def load(folder: Path) -> dict[str, Result]:
    """The results that are there, in the order of ABOUT."""
    paths = {name: folder / f"{name}.json" for name in ABOUT}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}


def summary(results: dict[str, Result]) -> list[list[str]]:
    """A row a study: what it asks, the paper's figure, the verdict and its parts."""
    rows = []
    for name, says in ABOUT.items():
        link = f"[{says}](#fashion-mnist-{name})"
        if name not in results:
            rows.append([link, PAPER[name], "not run yet", ""])
            continue
        parts = [f"{part['says']}: {VERDICTS[part['verdict']]}" for part in results[name]["parts"]]
        rows.append([link, PAPER[name], f"**{VERDICTS[results[name]['verdict']]}**", "<br>".join(parts)])
    return rows


def parts(result: Result) -> list[list[str]]:
    """Each part of a claim with its advantage and standard error, seed by seed."""
    rows = []
    for part in result["parts"]:
        pairs = zip(part["advantages"], part["errors"], strict=True)
        values = ", ".join(f"{advantage:+.3g} ± {error:.2g}" for advantage, error in pairs)
        rows.append([part["says"], values, VERDICTS[part["verdict"]]])
    return rows


def finals(result: Result) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row a name: its last scores, seed by seed, and the pictures it saw."""
    last: dict[str, dict[int, dict[str, Any]]] = {}
    for row in result["rows"]:
        last.setdefault(row["name"], {})[row["seed"]] = row
    metrics = [name for name in METRICS if any(name in row for row in result["rows"])]
    seen = any("pictures" in row for row in result["rows"])
    rows = []
    for name, seeds in last.items():
        cells = [name]
        for metric in metrics:
            values = [row[metric] for row in seeds.values() if metric in row]
            error = max((row.get(f"{metric}_error", 0.0) for row in seeds.values()), default=0.0)
            each = [f"{value:.{METRICS[metric]}f}" for value in values]
            text = ", ".join(each if len(set(each)) > 1 else each[:1])
            cells.append(f"{text} ± {error:.1g}" if error else text)
        if seen:
            row = next(iter(seeds.values()))
            cells += [f"{row['pictures']:,}", f"{training_pflops(result, row):.3f}"]
        rows.append(cells)
    return ["", *metrics, *(["pictures", "training PFLOPs"] if seen else [])], rows


def training_pflops(result: Result, row: dict[str, Any]) -> float:
    """PFLOPs of all samples that the arm of a row was trained on."""
    costs = result["training_gflops_a_picture"]
    arm = max((name for name in costs if row["name"].startswith(name)), key=len)
    return row["pictures"] * costs[arm] / 1e6


def plot_curves(result: Result, path: Path) -> bool:
    """FD over the FLOPs of training, a line a name and seed; False where the study has no such curves."""
    curves: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for row in result["rows"]:
        if "pictures" in row:
            curves.setdefault((row["name"], row["seed"]), []).append((training_pflops(result, row), row["FD"]))
    if not curves:
        return False
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import ScalarFormatter

    names = list(dict.fromkeys(name for name, _ in curves))
    figure, axes = pyplot.subplots(figsize=(6.4, 3.8), layout="constrained")
    for (name, seed), points in curves.items():
        label = name if seed == min(s for n, s in curves if n == name) else None
        axes.plot(
            *zip(*sorted(points), strict=True), color=f"C{names.index(name)}", marker="o", markersize=3, label=label
        )
    axes.set(xlabel="training PFLOPs", ylabel="Fréchet distance (lower is better)", yscale="log")
    for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        ticks(ScalarFormatter())
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
