"""What `elit inspect` writes: the pictures, inspect.json and a page about them."""

import json
from pathlib import Path
from typing import Any

from elit.evaluate.inspect import inside_plots
from elit.evaluate.inspect.inspection import Inspection
from elit.evaluate.report.html import Section, write_page
from elit.files import write_text

PICTURES = {
    "attention_and_loss.png": inside_plots.attention_and_loss,
    "examples.png": inside_plots.examples,
    "latents_read.png": inside_plots.latents_read,
    "entropy.png": inside_plots.entropy,
    "latents_matter.png": inside_plots.latents_matter,
    "budgets.png": inside_plots.budgets,
}
CORRELATION = ("t", "loss", "correlation", "std", "inside windows", "std", "of the mean maps")
WITHOUT = ("dropped", "loss", "increase", "standard error")


def is_inspection(name: str) -> bool:
    """Whether a file of that name is one of those that `write_inside` writes."""
    return name in (*PICTURES, "inspect.json", "report.html")


def write_inside(inspection: Inspection, out: Path, title: str) -> Path:
    """Writes the pictures, inspect.json and report.html into `out`; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        draw(inspection, out / name)
    write_text(out / "inspect.json", json.dumps(inspection.numbers, indent=1, allow_nan=False) + "\n")
    write_page(out / "report.html", f"Inside {title}", lead(inspection), sections(inspection, out))
    return out / "report.html"


def lead(inspection: Inspection) -> str:
    """How the numbers were made, in a few sentences."""
    how = inspection.numbers["made"]
    times = ", ".join(f"{time:g}" for time in how["times"])
    clips = (
        " Of clips the first frame is shown."
        if inspection.look.loss.shape[2] > inspection.maps["loss"][0, 0].numel()
        else ""
    )
    return (
        f"{len(inspection.names)} samples of {how['examples']['data']}, each seen through {how['draws']} draws of "
        f"noise at t = {times} (0 = noise, 1 = data). The noise is the same in every measurement. All numbers, and "
        f"how they were made, are in inspect.json.{clips}"
    )


def sections(inspection: Inspection, out: Path) -> list[Section]:
    """A section a picture, with its numbers."""
    rows, without, budgets = (inspection.numbers[name] for name in ("attention_and_loss", "without", "budgets"))
    latents = inspection.numbers["latents"]
    first, last = latents[0]["entropy"], latents[-1]["entropy"]
    return [
        Section(
            title="Where Read looks, and where the loss is",
            text="A latent's weights sum to 1 over its window, so their sum over latents says how much each token is "
            "read: one number above another inside a window, while every window gets as much in all. White lines are "
            "windows. The rank correlation (Spearman's) is of single samples; below 0, high loss is read less.",
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
            title="What the first and the last latents read",
            text="Mean over all times and draws. Each window has its own copy of a latent.",
            image=out / "latents_read.png",
            alt="Attention of single latents",
        ),
        Section(
            title="How widely each latent reads",
            text=f"Entropy of the attention of a latent over its window of {inspection.look.tokens_per_group} tokens: "
            f"{first:.2f} nats for the first latent, {last:.2f} for the last, {latents[0]['most']:.2f} at most.",
            image=out / "entropy.png",
            alt="Entropy of the attention of each latent",
        ),
        Section(
            title="Which latents matter",
            text="Left: one latent is gone from every group, the others keep their places. Right: the tail is cut as a "
            "budget does. Bars are standard errors over samples; on the right, of the difference to all latents.",
            image=out / "latents_matter.png",
            alt="Loss as each latent is dropped, and loss of every budget",
            headings=WITHOUT,
            rows=[without_cells(row) for row in without],
        ),
        Section(
            title="The loss of every budget",
            text="Latents kept of every group, and the cost of one forward.",
            headings=("latents", "GFLOPs", "loss", "increase", "standard error"),
            rows=[[str(row["latents"]), f"{row['gflops']:.4g}", *_loss(row)] for row in budgets],
        ),
        Section(
            title="The same noise at every budget",
            text=f"{_sampling(inspection.numbers['made'])} Only the number of latents changes from row to row."
            + (
                ""
                if inspection.numbers["made"]["pictures"]
                else " Not pictures: the mean over the channels of latents."
            ),
            image=out / "budgets.png",
            alt="Samples, one row a budget",
        ),
    ]


def _sampling(how: dict[str, Any]) -> str:
    guidance = how["sampling"]["guidance"]
    with_ = f"{guidance['kind'].upper()} at scale {guidance['scale']:g}" if guidance else "no guidance"
    return f"{how['sampling']['steps']} steps ({how['sampling']['solver']}), {with_}."


def correlation_cells(row: dict[str, Any]) -> list[str]:
    """The columns of `CORRELATION`, of a row of inspect.json's attention_and_loss."""
    spreads = [_text(row[kind][part]) for kind in ("spearman", "in_windows") for part in ("mean", "std")]
    return [f"{row['t']:g}", f"{row['loss']:.4f}", *spreads, _text(row["of_means"])]


def without_cells(row: dict[str, Any]) -> list[str]:
    """The columns of `WITHOUT`, of a row of inspect.json's without."""
    latents = row["latents"]
    return [str(latents[0]) if len(latents) == 1 else f"{latents[0]}–{latents[-1]}", *_loss(row)]


def _loss(row: dict[str, Any]) -> list[str]:
    return [f"{row['loss']:.5f}", f"{row['increase']:+.5f}", f"{row['standard_error']:.5f}"]


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"
