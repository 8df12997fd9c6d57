"""Tables for the terminal and for cards."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """Prints to stdout, numbers aligned right; as wide as necessary where stdout is not a terminal."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for column, heading in enumerate(headings):
        numeric = all(row[column][:1].isdigit() or row[column] in ("", "-") for row in rows)
        table.add_column(escape(heading), justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(table)


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---:"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
