"""A hook of mkdocs: links to files of the repository that are no pages of the site become their paths in plain code."""

import logging
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#\s]+)[^)]*\)")
log = logging.getLogger("mkdocs.hooks.links")


def on_page_markdown(markdown: str, *, page, **_) -> str:
    def as_path(match: re.Match) -> str:
        text, target = match.groups()
        path = (ROOT / "docs" / target).resolve()
        if not path.exists():
            log.warning("%s links to '%s', which is not in the repository", page.file.src_uri, target)
        name = path.relative_to(ROOT).as_posix()
        return f"`{name}`" if text.strip("`").rstrip("/") in (name, path.name) else f"{text} (`{name}`)"

    return LINK.sub(as_path, markdown)
