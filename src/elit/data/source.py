"""Sources of pictures: folders, parquet files, webdataset tars and what Hugging Face `datasets` saved."""

import csv
import hashlib
import io
import json
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from elit.data.reader import SUFFIXES, is_animation, read_frames
from elit.files import read_lines, read_text
from elit.models.conditioning import recognised
from elit.models.text import CACHE

METADATA, TABLES = ("metadata.jsonl", "metadata.csv"), (".parquet", ".tar")
LABELS, TEXTS = ("label", "cls", "class"), ("text", "caption", "txt")
KEPT = ".pictures.json"  # end of the name of the file in which training keeps what it found in the pictures
Entry = tuple[str, Callable[[], bytes], Any]  # a picture's name, the way to its file, its label or caption


class Picture(NamedTuple):
    """One picture of a source."""

    name: str  # a path, or a file and a row, for messages
    content: Callable[[], bytes]
    label: int
    fault: str  # the fault of its label, or nothing


@dataclass(frozen=True, kw_only=True)
class Source:
    """Pictures or clips in an order that never changes, read on access, each with a class or caption."""

    root: Path
    pictures: Sequence[Picture]
    classes: tuple[str, ...]  # the meaning of each label; none where pictures lie loose in a folder
    files: Sequence[Path]
    left_out: dict[str, list[str]]  # the names of files that are not taken, by reason

    @property
    def folder(self) -> Path:
        """The place of files that belong to the source."""
        return self.root if self.root.is_dir() else self.root.parent

    @property
    def captions(self) -> tuple[str, ...]:
        """A prompt for each label."""
        return tuple(name.replace("_", " ") for name in self.classes)

    @cached_property
    def labels(self) -> list[int]:
        return [picture.label for picture in self.pictures]

    @cached_property
    def true_labels(self) -> list[int]:
        """Labels as a classifier counts them."""
        numbers = recognised(self.classes)
        return [numbers[label] for label in self.labels] if numbers else self.labels

    @cached_property
    def identity(self) -> dict[str, object]:
        """Its count, a digest of names and labels, and a stamp of its files: equal for the same source alone."""
        folder = f"{self.root}/"
        stats = {str(path).removeprefix(folder): path.stat() for path in self.files if path.exists()}
        states = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()]
        content = [[picture.name.removeprefix(folder) for picture in self.pictures], self.labels, self.classes]
        source, stamp = (hashlib.sha256(json.dumps(each).encode()).hexdigest() for each in (content, states))
        return {"count": len(self), "source": source, "stamp": stamp}

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, index: int, count: int | None = 1) -> list[Image.Image]:
        """The first `count` frames of a picture, all for None. Raises ValueError if unreadable or unlabelled."""
        picture = self.pictures[index]
        try:
            if picture.fault:
                raise ValueError(picture.fault)
            return read_frames(picture.content(), count)
        except Exception as error:  # whatever a decoder raises costs one picture, not the run
            reason = " ".join(str(error).split()).partition(" <_io")[0] or type(error).__name__
            raise ValueError(f"cannot read {picture.name!r}: {reason}") from None

    def moves(self, index: int) -> bool:
        """True for an animation, of which some frames may be damaged."""
        with suppress(Exception):  # whatever a decoder raises
            return is_animation(self.pictures[index].content())
        return False

    def subset(self, rows: Sequence[int]) -> "Source":
        return replace(self, pictures=[self.pictures[row] for row in rows])

    def not_taken(self) -> list[str]:
        """A line for each reason why files are left out."""
        return [f"data: not taken: {len(each)} {why}, {each[0]!r} for one" for why, each in self.left_out.items()]


def open_source(path: Path, *, captions: bool = False, loose: bool = False) -> Source:
    """The pictures at `path`: a folder of them, of .parquet or of .tar files, one such file, or a saved data set."""
    if not path.exists() or (path.is_file() and path.suffix not in TABLES):
        raise ValueError(f"cannot read {str(path)!r}: must be a folder, a .parquet or a .tar")
    saved = path.is_dir() and any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
    found, left_out = _list_folder(path)
    tables = [path] if path.is_file() else [table for table in found["tables"] if table.parent == path]
    strays = [picture for picture in found["pictures"] if picture.parent == path]
    names: Sequence[str] = ()
    if saved or (tables and not found["pictures"]):
        wanted = TEXTS if captions else LABELS
        files = sorted(path.iterdir()) if saved else [each for each in tables if each.suffix == tables[0].suffix]
        if saved or files[0].suffix == ".parquet":
            entries, names = _rows(path, [] if saved else files, wanted, loose)
        else:
            entries = [entry for file in files for entry in _samples(file, wanted, loose)]
            if not captions and all(re.fullmatch(r"-?\d+", text) for *_, text in entries if text):
                entries = [(name, content, int(text) if text else None) for name, content, text in entries]
        if saved:
            left_out.clear()
        left_out["archives of another kind or in sub-folders"] += map(str, sorted({*found["tables"]} - {*files}))
    else:
        captions = captions and bool(found["metadata"])
        if captions:
            lines = [entry for metadata in found["metadata"] for entry in _captions(metadata)]
            texts = list({repr(entry): entry for entry in lines}.values())  # a line that is there again is no sample
            unnamed = {*found["pictures"]} - {file for file, _ in texts}
            left_out["pictures without a line of metadata"] += map(str, unnamed)
        elif strays and (loose or len(strays) == len(found["pictures"])):
            texts = [(file, path.resolve().name) for file in found["pictures"]]
        else:
            texts = [(file, file.relative_to(path).parts[0]) for file in found["pictures"] if file.parent != path]
            left_out["pictures beside the classes' folders"] += map(str, strays)
        left_out["archives beside pictures"] += map(str, found["tables"])
        files = [file for file, _ in texts]
        entries = [(str(file), file.read_bytes, text) for file, text in texts]
    left_out = {why: sorted(name.removeprefix(f"{path}/") for name in each) for why, each in left_out.items() if each}
    if not entries:
        reasons = "".join(f"; {len(each)} {reason}" for reason, each in left_out.items())
        raise ValueError(f"cannot read {str(path)!r}: no pictures in it{reasons}")
    unknown = loose and (bool(strays) or all(value is None for *_, value in entries))
    values = [0 if unknown else value for *_, value in entries]
    numbers, must, classes = _number_labels(values, names, captions)
    pictures = [
        Picture(name, content, number or 0, f"{must}, got {value!r}" if number is None else "")
        for (name, content, value), number in zip(entries, numbers, strict=True)
    ]
    classes = () if unknown else classes
    return Source(root=path, pictures=pictures, classes=classes, files=files, left_out=left_out)


def _list_folder(root: Path) -> tuple[dict[str, list[Path]], dict[str, list[str]]]:
    """All pictures, metadata and tables below a folder; links to folders, which may go in circles, are not followed."""
    found: dict[str, list[Path]] = defaultdict(list)
    left_out: dict[str, list[str]] = defaultdict(list)
    for place, folders, files in os.walk(root):
        inside = Path(place).relative_to(root)
        links = [name for name in folders if (root / inside / name).is_symlink()]
        left_out["links to folders"] += [str(inside / name) for name in links]
        folders[:] = [name for name in folders if name not in (*links, CACHE)]
        for path in (inside / name for name in files if not name.endswith(KEPT)):
            if any(part[0] == "." for part in path.parts):
                left_out["hidden files"].append(str(path))
            elif (root / path).exists() and not (root / path).is_file():
                left_out["pipes and devices"].append(str(path))
            elif path.suffix.lower() in SUFFIXES:
                found["pictures"].append(root / path)
            elif path.name in METADATA or path.suffix in TABLES:
                found["metadata" if path.name in METADATA else "tables"].append(root / path)
            else:
                left_out[f"{path.suffix or 'other'} files"].append(str(path))
    for paths in found.values():
        paths.sort()
    return found, left_out


def _captions(path: Path) -> list[tuple[Path, object]]:
    number, found = 0, []
    csv_file = io.StringIO(read_text(path), newline="") if path.suffix == ".csv" else None
    lines: Iterable[Any] = csv.DictReader(csv_file) if csv_file else read_lines(path)
    try:
        for number, line in enumerate(lines, 1):  # noqa: B007
            row = line if isinstance(line, dict) else json.loads(line)
            texts = sorted((row[name] for name in TEXTS if name in row), key=lambda text: text is None)
            found.append((path.parent / row["file_name"], texts[0]))
    except (ValueError, LookupError, TypeError, csv.Error):
        raise ValueError(f'cannot read {str(path)!r}, entry {number}: must be {{"file_name": …, "text": …}}') from None
    if not found:
        raise ValueError(f"cannot read {str(path)!r}: no entries")
    return found


def _number_labels(
    values: Sequence[Any], names: Sequence[str], captions: bool
) -> tuple[list[int | None], str, tuple[str, ...]]:
    """Numbers, None for a value that is no label, what a label must be, and what the numbers stand for."""
    if captions or (not names and any(isinstance(value, str) for value in values)):
        kinds = (str, int, float) if captions else (str,)
        whole = [str(value).encode("utf-8", "backslashreplace").decode() for value in values]  # no half characters
        texts = [text if type(v) in kinds and v == v else None for text, v in zip(whole, values, strict=True)]  # or NaN
        known = dict.fromkeys(text for text in texts if text is not None)
        number = {name: number for number, name in enumerate(known if captions else sorted(known))}
        must = f"{'caption' if captions else 'label'} must be a text"
        return [None if text is None else number[text] for text in texts], must, tuple(number)
    # A column of whole numbers with gaps comes as floats.
    values = [int(value) if isinstance(value, float) and value.is_integer() else value for value in values]
    last = len(names) - 1 if names else max([0, *(value for value in values if isinstance(value, int))])
    numbers = [value if type(value) is int and 0 <= value <= last else None for value in values]
    return numbers, f"label must be from 0 to {last}", tuple(names or map(str, range(last + 1)))


def _rows(path: Path, files: Sequence[Path], wanted: Sequence[str], loose: bool) -> tuple[list[Entry], Sequence[str]]:
    import datasets

    try:
        named = {"data_files": [str(file) for file in files]}
        rows = datasets.load_dataset("parquet", **named)["train"] if files else datasets.load_from_disk(path)
        features = rows.features
        image = next(name for name, kind in features.items() if isinstance(kind, datasets.Image))
        label = next(iter([name for name in wanted if name in features] + [""] * loose))
    except (AttributeError, StopIteration):
        columns = f"a column of pictures and one named {' or '.join(wanted)}"
        raise ValueError(f"cannot read {str(path)!r}: must be one split with {columns}") from None
    except Exception as error:
        raise ValueError(f"cannot read {str(path)!r}: {str(error.__cause__ or error).splitlines()[0]}") from None
    column = rows.cast_column(image, datasets.Image(decode=False))[image]
    values = rows[label] if label else [None] * len(rows)
    entries = [(f"{path}, row {row}", partial(_cell, column, row), value) for row, value in enumerate(values)]
    return entries, getattr(features.get(label), "names", None) or ()


def _cell(column: Any, row: int) -> bytes:
    value = column[row]
    if value is None:
        raise ValueError("no picture in this row")
    return Path(value["path"]).read_bytes() if value["bytes"] is None else value["bytes"]


def _samples(path: Path, wanted: Sequence[str], loose: bool) -> list[Entry]:
    """Samples of a tar: members of one name up to the first dot, a picture with .cls, .label, .txt or their kin."""
    samples: dict[str, dict[str, Callable[[], bytes]]] = defaultdict(dict)
    try:
        with tarfile.open(path, "r:") as archive, path.open("rb") as file:
            for each in archive:
                stem, _, kind = each.name.rpartition("/")[2].partition(".")
                if each.isfile() and stem:
                    content = partial(_slice, path, each.offset_data, each.size)
                    samples[f"{path}, {each.name.removesuffix(f'.{kind}')}"][kind.lower()] = content
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("no end of the archive; it is cut short or damaged")
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}") from None
    entries: list[Entry] = []
    for name, members in samples.items():
        pictures = (content for kind, content in members.items() if f".{kind.rpartition('.')[2]}" in SUFFIXES)
        text = next((content for kind, content in members.items() if kind in wanted), None)
        entries.append((name, next(pictures, _no_picture), text and text().decode("utf-8-sig", "replace").strip()))
    if not loose and not any(text for _, _, text in entries):
        raise ValueError(f"cannot read {str(path)!r}: must have members .{', .'.join(wanted)}")
    return entries


def _slice(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


def _no_picture() -> bytes:
    raise ValueError("no picture of this name")
