"""Sources of pictures: folders, parquet files, webdataset tars and data sets that Hugging Face `datasets` saved.

A folder has one sub-folder a class, or captions in metadata.jsonl or metadata.csv, wherever below it these lie.
"""

import csv
import hashlib
import io
import json
import os
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from elit.data.reader import SUFFIXES, ImageInfo, read_frames, read_info
from elit.models.text import CACHE

T = TypeVar("T")
METADATA, TABLES = ("metadata.jsonl", "metadata.csv"), (".parquet", ".tar")
LABELS, TEXTS = ("label", "cls", "class"), ("text", "caption", "txt")
KEPT = ".pictures.json"
"""The end of the name of the file in which training keeps what it found when it read the pictures."""
LeftOut = dict[str, list[str]]
"""By reason, the names of files that are not taken."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Pictures or clips in an order that never changes, read when asked for, each with a class or caption."""

    root: Path
    names: Sequence[str]
    """Each picture's in messages: a path, or a file and a row."""
    readers: Sequence[Callable[[], bytes]]
    """Each picture's file."""
    files: Sequence[Path]
    """What the pictures are read from."""
    labels: Sequence[int]
    """Numbers of classes or captions."""
    classes: tuple[str, ...]
    """What the labels stand for; none where pictures lie loose in a folder."""
    faults: dict[int, str]
    """By index, what is wrong with a label."""
    left_out: LeftOut

    @property
    def folder(self) -> Path:
        """Where to keep what belongs to the source."""
        return self.root if self.root.is_dir() else self.root.parent

    @property
    def captions(self) -> tuple[str, ...]:
        """A prompt for each label."""
        return tuple(name.replace("_", " ") for name in self.classes)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int, count: int | None = 1) -> list[Image.Image]:
        """The first `count` frames of a picture, all for None, as `read_frames` gives them.

        Raises ValueError, naming the picture, for any that cannot be read or has no valid label.
        """
        return self._named(index, lambda content: read_frames(content, count))

    def info(self, index: int) -> ImageInfo:
        """A picture's header. Raises as `read`."""
        return self._named(index, read_info)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What tells whether a source is the same: its count, a digest of names and labels, a stamp of its files."""
        names, files = ([str(each).removeprefix(f"{self.root}/") for each in some] for some in (self.names, self.files))
        stats = [path.stat() if path.exists() else None for path in self.files]
        states = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in zip(files, stats, strict=True) if stat]
        return {
            "count": len(self),
            "source": _digest([names, list(self.labels), self.classes]),
            "stamp": _digest(states),
        }

    def subset(self, rows: Sequence[int]) -> "Source":
        """Some rows, as a source."""
        names, readers, labels = ([each[row] for row in rows] for each in (self.names, self.readers, self.labels))
        faults = {index: self.faults[row] for index, row in enumerate(rows) if row in self.faults}
        return replace(self, names=names, readers=readers, labels=labels, faults=faults)

    def _named(self, index: int, read: Callable[[bytes], T]) -> T:
        try:
            if index in self.faults:
                raise ValueError(self.faults[index])
            return read(self.readers[index]())
        except Exception as error:  # whatever a decoder raises costs one picture, not the run
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"cannot read {self.names[index]!r}: {reason}") from None


def open_source(path: Path, *, captions: bool = False, loose: bool = False) -> Source:
    """The pictures at `path`: a folder of them, of .parquet or of .tar files, one such file, or a saved data set.

    captions: labels number texts (metadata, a text column) instead of classes. loose: pictures may lie beside the
    sub-folders of a folder; then there are no classes. Raises ValueError.
    """
    if not path.exists() or (path.is_file() and path.suffix not in TABLES):
        raise ValueError(f"cannot read {str(path)!r}: must be a folder, a .parquet or a .tar")
    if path.is_file():
        return _open_table(path, [path], captions)
    if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return _open_table(path, [], captions)
    found, left_out = _list_folder(path)
    pictures, tables = found["pictures"], [table for table in found["tables"] if table.parent == path]
    if tables and not pictures:
        return _open_table(path, [table for table in tables if table.suffix == tables[0].suffix], captions)
    strays = [picture for picture in pictures if picture.parent == path]
    left_out["archives beside pictures"] = [table.name for table in found["tables"]]
    if captions := captions and bool(found["metadata"]):
        entries = [entry for metadata in found["metadata"] for entry in _captions(metadata)]
        files, values = [file for file, _ in entries], [text for _, text in entries]
        rest = set(pictures) - set(files)
        left_out["pictures without a line of metadata"] = [str(file.relative_to(path)) for file in rest]
    elif loose and strays:
        files, values = pictures, [0] * len(pictures)
    else:
        files = [picture for picture in pictures if picture.parent != path]
        values = [file.relative_to(path).parts[0] for file in files]
        left_out["pictures beside the classes' folders"] = [stray.name for stray in strays]
        left_out["folders without pictures, which are no classes"] = [
            name for name in os.listdir(path) if _is_class(path / name) and name not in values
        ]
    left_out = {reason: sorted(names) for reason, names in left_out.items() if names}
    if not files:
        reasons = "".join(f"; {len(names)} {reason}" for reason, names in left_out.items())
        where = "in it" if loose else "in its sub-folders, such as CLASS/PICTURE.png"
        raise ValueError(f"cannot read {str(path)!r}: no pictures {where}{reasons}")
    labels = number_labels(values, captions=captions)
    if loose and strays:
        labels["classes"] = ()
    readers = [file.read_bytes for file in files]
    return Source(root=path, names=list(map(str, files)), readers=readers, files=files, left_out=left_out, **labels)


def _is_class(path: Path) -> bool:
    return path.is_dir() and path.name[0] != "." and not path.is_symlink()


def _list_folder(root: Path) -> tuple[dict[str, list[Path]], LeftOut]:
    """All pictures, metadata and tables below a folder; links to folders, which may go in circles, are not followed."""
    found: dict[str, list[Path]] = defaultdict(list)
    left_out: LeftOut = defaultdict(list)
    for place, folders, files in os.walk(root):
        inside = Path(place).relative_to(root)
        links = [name for name in folders if (root / inside / name).is_symlink()]
        left_out["links to folders"] += [str(inside / name) for name in links]
        folders[:] = [name for name in folders if name not in (*links, CACHE)]
        for path in (inside / name for name in files if not name.endswith(KEPT)):
            if any(part[0] == "." for part in path.parts):
                left_out["hidden files"].append(str(path))
            elif path.suffix.lower() in SUFFIXES:
                found["pictures"].append(root / path)
            elif path.name in METADATA or path.suffix in TABLES:
                found["metadata" if path.name in METADATA else "tables"].append(root / path)
            else:
                left_out[f"{path.suffix or 'other'} files"].append(str(path))
    for paths in found.values():
        paths.sort()
    return found, left_out


def _captions(path: Path) -> list[tuple[Path, Any]]:
    """Files and captions of metadata.jsonl or metadata.csv, in UTF-8 or UTF-16. Raises ValueError."""
    content, number, found = path.read_bytes(), 0, []
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        lines: Iterable[Any] = (line for line in text.split("\n") if line.strip())  # U+2028 belongs to a caption
        if path.suffix == ".csv":
            lines = csv.DictReader(io.StringIO(text, newline=""))
        for number, line in enumerate(lines, 1):  # noqa: B007
            row = line if isinstance(line, dict) else json.loads(line)
            found.append((path.parent / row["file_name"], next(row[name] for name in TEXTS if name in row)))
    except (ValueError, KeyError, TypeError, StopIteration, csv.Error) as error:
        reason = "must be UTF-8" if isinstance(error, UnicodeError) else 'must be {"file_name": …, "text": …}'
        raise ValueError(f"cannot read {str(path)!r}, entry {number}: {reason}") from None
    if not found:
        raise ValueError(f"cannot read {str(path)!r}: no entries")
    return found


def number_labels(values: Sequence[Any], names: Sequence[str] = (), *, captions: bool = False) -> dict[str, Any]:
    """The labels, classes and faults of a `Source`: whole numbers as they are, of `names` where these are known.

    Texts are numbered: classes in alphabetical order, captions by first appearance. A value that is none costs its row.
    """
    # A column of whole numbers with gaps comes as floats.
    values = [
        int(value) if isinstance(value, float) and value.is_integer() and not captions else value for value in values
    ]
    texts = captions or (not names and any(isinstance(value, str) for value in values))
    last = len(names) - 1 if names else max([0, *(value for value in values if isinstance(value, int))])
    if texts:
        valid = [isinstance(value, str) or (captions and type(value) in (int, float)) for value in values]
    else:
        valid = [type(value) is int and 0 <= value <= last for value in values]
    what = "caption must be a text" if captions else f"label must be {'a text' if texts else f'from 0 to {last}'}"
    faults = {row: f"{what}, got {value!r}" for row, value in enumerate(values) if not valid[row]}
    known = list(dict.fromkeys(str(value) for value, good in zip(values, valid, strict=True) if good))
    classes = known if captions else sorted(known) if texts else names or list(map(str, range(last + 1)))
    number = {name: number for number, name in enumerate(classes)}
    labels = [
        (number[str(value)] if texts else value) if good else 0 for value, good in zip(values, valid, strict=True)
    ]
    return {"labels": labels, "classes": tuple(classes), "faults": faults}


def _open_table(path: Path, files: Sequence[Path], captions: bool) -> Source:
    """Rows of parquet files or a saved data set, or the samples of tars."""
    if files and files[0].suffix == ".tar":
        return _open_tars(path, files, captions)
    import datasets

    try:
        data_files = [str(file) for file in files]
        rows = (
            datasets.load_dataset("parquet", data_files=data_files)["train"] if files else datasets.load_from_disk(path)
        )
        features, wanted = rows.features, TEXTS if captions else LABELS
        image = next(name for name, kind in features.items() if isinstance(kind, datasets.Image))
        label = next(name for name in wanted if name in features)
    except (AttributeError, StopIteration):
        raise ValueError(
            f"cannot read {str(path)!r}: must have a column of pictures and one named {', '.join(wanted)}"
        ) from None
    except Exception as error:
        raise ValueError(f"cannot read {str(path)!r}: {str(error.__cause__ or error).splitlines()[0]}") from None
    names = getattr(features[label], "names", ())
    column = rows.cast_column(image, datasets.Image(decode=False))[image]
    return Source(
        root=path,
        names=[f"{path}, row {row}" for row in range(len(rows))],
        readers=[partial(_read_cell, column, row) for row in range(len(rows))],
        files=files or sorted(path.iterdir()),
        left_out={},
        **number_labels(list(rows[label]), names or (), captions=captions),
    )


def _read_cell(column: Any, row: int) -> bytes:
    value = column[row]
    if value is None:
        raise ValueError("no picture in this row")
    return Path(value["path"]).read_bytes() if value["bytes"] is None else value["bytes"]


def _open_tars(path: Path, files: Sequence[Path], captions: bool) -> Source:
    """Members are samples by their name up to the first dot: a picture, with .cls, .label, .txt and their kin."""
    samples: dict[str, dict[str, Callable[[], bytes]]] = defaultdict(dict)
    for file in files:
        for name, member in _members(file):
            stem, _, kind = name.rpartition("/")[2].partition(".")
            if stem:
                samples[f"{file}, {name.removesuffix(f'.{kind}')}"][kind.lower()] = member
    wanted = TEXTS if captions else LABELS
    values: list[Any] = []
    readers: list[Callable[[], bytes]] = []
    for sample in samples.values():
        text = next((member for kind, member in sample.items() if kind in wanted), None)
        values.append(text and text().decode("utf-8-sig", "replace").strip())
        pictures = (member for kind, member in sample.items() if f".{kind.rpartition('.')[2]}" in SUFFIXES)
        readers.append(next(pictures, _no_picture))
    if not any(values):
        raise ValueError(f"cannot read {str(path)!r}: must have members .{', .'.join(wanted)}")
    if not captions and all(value.lstrip("-").isdecimal() for value in values if value):
        values = [int(value) if value else None for value in values]
    labels = number_labels(values, captions=captions)
    return Source(root=path, names=list(samples), readers=readers, files=files, left_out={}, **labels)


def _members(path: Path) -> list[tuple[str, Callable[[], bytes]]]:
    """The files in a tar. Raises ValueError for one that is cut short, wherever that is."""
    try:
        with tarfile.open(path, "r:") as archive, path.open("rb") as file:
            found = [
                (each.name, partial(_slice, path, each.offset_data, each.size)) for each in archive if each.isfile()
            ]
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("no end of the archive; it is cut short or damaged")
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}") from None
    return found


def _slice(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


def _no_picture() -> bytes:
    raise ValueError("no picture of this name")


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
