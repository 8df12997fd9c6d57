"""Tables for the terminal and for pages."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:  # prices and lists are tables too, and load no detector
    from elit.evaluate.run import Score


def headings(scores: Sequence["Score"]) -> tuple[str, ...]:
    """What the columns of `score_cells` are."""
    kind = "image" if scores[0].steady is None else "clip"
    columns = ("budget", "latents", "guidance", f"GFLOPs/{kind}", f"ms/{kind}", "FD", "accuracy")
    return columns if kind == "image" else (*columns, "steady")


def score_cells(score: "Score") -> tuple[str, ...]:
    """The columns of `headings` as text."""
    return (
        f"{score.budget:.4g}",
        str(score.tokens_per_group),
        score.guidance.upper() if score.guidance != "none" else "none",
        f"{score.gflops_per_image:.3f}",
        f"{score.ms_per_image:.2f}",
        f"{score.fd:.1f}",
        f"{score.accuracy:.3f}",
        *([] if score.steady is None else [f"{score.steady:.3f}"]),
    )


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """Prints to stdout, numbers aligned right; as wide as it needs where stdout is no terminal."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for column, heading in enumerate(headings):
        numeric = all(row[column][:1].isdigit() or row[column] in ("", "-") for row in rows)
        table.add_column(heading, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(table)
