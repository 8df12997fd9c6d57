"""Folders of pictures: one sub-folder a class, or the captions of metadata.jsonl and metadata.csv."""

import csv
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elit.data.reader import SUFFIXES
from elit.models.text import CACHE

METADATA = ("metadata.jsonl", "metadata.csv")
TEXTS = ("text", "caption", "txt")
TABLES = (".parquet", ".tar")
KEPT = ".pictures.json"
"""The end of the name under which is kept what was found when pictures were read."""


@dataclass
class Listing:
    """The files below a folder, each sorted, and by reason the names of those that are not taken."""

    pictures: list[Path] = field(default_factory=list)
    metadata: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def list_folder(root: Path) -> Listing:
    """Everything below `root`; links to folders may lead out of it or in circles, and are not followed."""
    listing = Listing()
    for place, folders, files in os.walk(root):
        folder = Path(place)
        links = {name for name in folders if (folder / name).is_symlink()}
        listing.left_out["links to folders"] += [str((folder / name).relative_to(root)) for name in sorted(links)]
        folders[:] = [name for name in folders if name not in links and name != CACHE]
        hidden = any(part[0] == "." for part in folder.relative_to(root).parts)
        for path in (folder / name for name in files if not name.endswith(KEPT)):
            if hidden or path.name[0] == ".":
                listing.left_out["hidden files"].append(str(path.relative_to(root)))
            elif path.suffix.lower() in SUFFIXES:
                listing.pictures.append(path)
            elif path.name in METADATA:
                listing.metadata.append(path)
            elif path.suffix in TABLES:
                listing.tables.append(path)
            else:
                listing.left_out[f"{path.suffix or 'other'} files"].append(str(path.relative_to(root)))
    for paths in (listing.pictures, listing.metadata, listing.tables):
        paths.sort()
    return listing


def by_class(root: Path, listing: Listing) -> tuple[list[Path], list[str]]:
    """The pictures in sub-folders of `root`, and the name of each one's."""
    files = [path for path in listing.pictures if path.parent != root]
    strays = [path.name for path in listing.pictures if path.parent == root]
    listing.left_out["pictures beside the classes' folders"] += strays
    names = [path.relative_to(root).parts[0] for path in files]
    folders = {path.name for path in root.iterdir() if path.is_dir() and path.name[0] != "." and not path.is_symlink()}
    listing.left_out["folders without pictures, which are no classes"] += sorted(folders - set(names))
    return files, names


def by_caption(root: Path, listing: Listing) -> tuple[list[Path], list[Any]]:
    """The pictures that the metadata files name, in their order, and the caption of each. Raises ValueError."""
    files: list[Path] = []
    captions: list[Any] = []
    for path in listing.metadata:
        for number, row in _rows(path):
            text = next((name for name in TEXTS if name in row), None)
            if text is None or not isinstance(row.get("file_name"), str):
                raise ValueError(f'cannot read line {number} of {str(path)!r}: must be {{"file_name": …, "text": …}}')
            files.append(path.parent / row["file_name"])
            captions.append(row[text])
    if not files:
        raise ValueError(f"cannot read {str(listing.metadata[0])!r}: no lines")
    rest = sorted(set(listing.pictures) - set(files))
    listing.left_out["pictures without a line of metadata"] += [str(path.relative_to(root)) for path in rest]
    return files, captions


def number_labels(values: Sequence[Any], names: Sequence[str] = (), *, captions: bool = False) -> "Labels":
    """Numbers for labels of any kind: names where they are known, whole numbers, texts.

    Texts are classes in alphabetical order, captions in the order of their first appearance.
    """
    faults: dict[int, str] = {}
    if captions:
        kinds: tuple[type, ...] = (str, int, float)
    else:
        # A column of whole numbers with gaps comes as floats.
        values = [None if value != value else value for value in values]
        values = [int(value) if isinstance(value, float) and value.is_integer() else value for value in values]
        kinds = (int,) if names or all(isinstance(value, int) for value in values if value is not None) else (str,)
    numbered = kinds == (int,)
    for index, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, kinds):
            what = "caption must be one text" if captions else "label must be a class"
            faults[index] = f"{what}, got {value!r}"
        elif isinstance(value, int) and numbered and not 0 <= value < (len(names) or value + 1):
            faults[index] = f"label must be {f'from 0 to {len(names) - 1}' if names else '0 or more'}, got {value}"
    valid = [value for index, value in enumerate(values) if index not in faults]
    if numbered:
        classes = tuple(names) or tuple(map(str, range(max(valid, default=-1) + 1)))
        return Labels([0 if index in faults else value for index, value in enumerate(values)], classes, faults)
    texts = list(dict.fromkeys(map(str, valid)))
    texts = texts if captions else sorted(texts)
    numbers = {text: number for number, text in enumerate(texts)}
    return Labels([numbers.get(str(value), 0) for value in values], tuple(texts), faults)


@dataclass(frozen=True)
class Labels:
    """Numbers of classes or captions, what they stand for, and by index what is wrong with a label."""

    numbers: list[int]
    names: tuple[str, ...]
    faults: dict[int, str]


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and fields. Raises ValueError."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"cannot read {str(path)!r}: must be UTF-8") from None
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        try:
            yield from ((reader.line_num, row) for row in reader)
        except csv.Error as error:
            raise ValueError(f"cannot read line {reader.line_num} of {str(path)!r}: {error}") from None
        return
    for number, line in enumerate(text.split("\n"), 1):  # other separators, such as U+2028, belong to a caption
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                row = None
            yield number, row if isinstance(row, dict) else {}
