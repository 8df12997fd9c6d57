"""Output of `elit inspect`: the pictures, inspect.json and a page about them."""

import json
from pathlib import Path
from typing import Any

from elit.evaluate import sheets
from elit.evaluate.inspect.inspection import Inspection
from elit.evaluate.report.html import Section, write_page
from elit.files import write_text

PICTURES = {
    "attention_and_loss.png": sheets.attention_and_loss,
    "examples.png": sheets.examples,
    "latents_read.png": sheets.latents_read,
    "budgets.png": sheets.budgets,
}
OLD = ("entropy.png", "latents_matter.png")  # of earlier versions
CORRELATION = ("t", "loss", "correlation", "std", "inside windows", "std", "of the mean maps")


def is_inspection(name: str) -> bool:
    """A file of that name is one of those that `write_inspection` writes."""
    return name in (*PICTURES, *OLD, "inspect.json", "report.html")


def write_inspection(inspection: Inspection, out: Path, title: str) -> Path:
    """Writes the pictures, inspect.json and report.html into `out`; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        draw(inspection, out / name)
    write_text(out / "inspect.json", json.dumps(inspection.numbers, indent=1, allow_nan=False) + "\n")
    write_page(out / "report.html", f"Inside {title}", lead(inspection), sections(inspection, out))
    return out / "report.html"


def lead(inspection: Inspection) -> str:
    """The measurements in a few sentences."""
    made = inspection.numbers["made"]
    times = ", ".join(f"{time:g}" for time in made["times"])
    frames = inspection.read.loss.shape[2] > inspection.maps["loss"][0, 0].numel()
    return (
        f"{len(inspection.names)} samples of {made['examples']['data']}, with {made['draws']} draws of noise each at "
        f"t = {times} (0 = noise, 1 = data). The noise is the same in every measurement. All numbers and their "
        f"settings are in inspect.json.{' Of clips the first frame is shown.' if frames else ''}"
    )


def sections(inspection: Inspection, out: Path) -> list[Section]:
    """A section a picture, with its numbers."""
    rows, budgets = inspection.numbers["attention_and_loss"], inspection.numbers["budgets"]
    pixels = inspection.numbers["made"]["pictures"]
    return [
        Section(
            title="Read's attention and the loss",
            text="A latent's weights sum to 1 over its window, so their sum over latents compares tokens inside a "
            "window, while every window gets the same total. White lines are windows. The rank correlation "
            "(Spearman's) is of single samples; below 0, tokens of high loss are read less.",
            image=out / "attention_and_loss.png",
            alt="Maps of attention and loss at several times, and their rank correlations",
            headings=CORRELATION,
            rows=[correlation_cells(row) for row in rows],
        ),
        Section(
            title="Single samples",
            text=f"At t = {rows[len(rows) // 2]['t']:g}, mean over draws of noise; ρ is their rank correlation.",
            image=out / "examples.png",
            alt="Data, attention and loss of single samples",
        ),
        Section(
            title="The first and the last latents",
            text="Mean over all times and draws. Each window has its own copy of a latent.",
            image=out / "latents_read.png",
            alt="Attention of single latents",
        ),
        Section(
            title="The loss of every budget",
            text="Latents kept of every group, and the cost of one forward. Standard errors are over samples, of the "
            "increase.",
            headings=("latents", "GFLOPs", "loss", "increase", "standard error"),
            rows=[[str(row["latents"]), f"{row['gflops']:.4g}", *_loss(row)] for row in budgets],
        ),
        Section(
            title="The same noise at every budget",
            text=f"{_sampling(inspection.numbers['made'])} Only the number of latents changes from row to row."
            + ("" if pixels else " Not pictures: the mean over the channels of latents."),
            image=out / "budgets.png",
            alt="Samples, one row a budget",
        ),
    ]


def _sampling(made: dict[str, Any]) -> str:
    guidance = made["sampling"]["guidance"]
    guided = f"{guidance['kind'].upper()} at scale {guidance['scale']:g}" if guidance else "no guidance"
    return f"{made['sampling']['steps']} steps ({made['sampling']['solver']}), {guided}."


def correlation_cells(row: dict[str, Any]) -> list[str]:
    """The columns of `CORRELATION`, of a row of inspect.json's attention_and_loss."""
    spreads = [_text(row[kind][part]) for kind in ("spearman", "in_windows") for part in ("mean", "std")]
    return [f"{row['t']:g}", f"{row['loss']:.4f}", *spreads, _text(row["of_means"])]


def _loss(row: dict[str, Any]) -> list[str]:
    return [f"{row['loss']:.5f}", f"{row['increase']:+.5f}", f"{row['standard_error']:.5f}"]


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"
