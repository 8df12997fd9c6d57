"""Self-contained pages: pictures inside, no script, readable on a phone."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from elit.files import write_text

STYLE = """
body { margin: 0 auto; padding: 1rem; max-width: 60rem; color: #1d2939; background: #fff;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
p { max-width: 44rem; } img { max-width: 100%; height: auto; display: block; margin: .5rem 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid #e4e7ec; text-align: right; white-space: nowrap; }
th { color: #475467; font-weight: 600; } code { background: #f2f4f7; padding: .1em .3em; border-radius: 4px; }
pre { background: #f2f4f7; padding: .7rem; border-radius: 6px; overflow-x: auto; } pre code { padding: 0; }
"""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, a paragraph and, where given, a picture, a table or a command."""

    title: str
    text: str
    image: Path | None = None
    headings: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    code: str = ""


def write_page(path: Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Writes one HTML file with everything in it."""
    body = "\n".join(_section(section) for section in sections)
    write_text(
        path,
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<p>{escape(lead)}</p>\n{body}\n</body>\n</html>\n",
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>", f"<p>{escape(section.text)}</p>"]
    if section.image:
        data = base64.b64encode(section.image.read_bytes()).decode()
        kind = section.image.suffix.removeprefix(".")
        parts.append(f'<img alt="{escape(section.title)}" src="data:image/{kind};base64,{data}">')
    if section.rows:
        head = "".join(f"<th>{escape(cell)}</th>" for cell in section.headings)
        rows = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>\n" for row in section.rows)
        parts.append(f'<div class="scroll"><table>\n<tr>{head}</tr>\n{rows}</table></div>')
    if section.code:
        parts.append(f"<pre><code>{escape(section.code)}</code></pre>")
    return "\n".join(parts)
