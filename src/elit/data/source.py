"""Sources of pictures: folders, parquet files, webdataset tars and data sets that Hugging Face `datasets` saved."""

import hashlib
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from PIL import Image

from elit.data.folders import TABLES, TEXTS, Labels, by_caption, by_class, list_folder, number_labels
from elit.data.reader import SUFFIXES, ImageInfo, read_frames, read_info

T = TypeVar("T")
LABELS = ("label", "cls", "class")


class Content(Protocol):
    """A picture's file, wherever it lies."""

    def read_bytes(self) -> bytes: ...


@dataclass(frozen=True, kw_only=True)
class Source:
    """Pictures or clips in an order that never changes, read when asked for, each with a class or caption."""

    root: Path
    names: Sequence[str]
    """Each picture's in messages: a path, or a file and a row."""
    contents: Sequence[Content]
    labels: Sequence[int]
    """Numbers of classes or captions."""
    classes: tuple[str, ...]
    """What the labels stand for; none where pictures lie loose in a folder."""
    files: Sequence[Path]
    """What the pictures are read from."""
    faults: dict[int, str] = field(default_factory=dict)
    """By index, what is wrong with a label."""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """By reason, the names of files that are not taken."""

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
        names = [name.removeprefix(f"{self.root}/") for name in self.names]
        stats = [(str(path).removeprefix(f"{self.root}/"), path.stat()) for path in self.files if path.exists()]
        return {
            "count": len(self),
            "source": _digest([names, list(self.labels), self.classes]),
            "stamp": _digest([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]),
        }

    def subset(self, rows: Sequence[int]) -> "Source":
        """Some rows, as a source."""
        faults = {index: self.faults[row] for index, row in enumerate(rows) if row in self.faults}
        names, contents, labels = ([each[row] for row in rows] for each in (self.names, self.contents, self.labels))
        return replace(self, names=names, contents=contents, labels=labels, faults=faults)

    def summary(self) -> list[str]:
        """A line for each reason for which files are not taken."""
        return [f"not taken: {len(names)} {reason}, {names[0]!r} for one" for reason, names in self.left_out.items()]

    def _named(self, index: int, read: Callable[[bytes], T]) -> T:
        try:
            if index in self.faults:
                raise ValueError(self.faults[index])
            return read(self.contents[index].read_bytes())
        except Exception as error:  # whatever a decoder raises costs one picture, not the run
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"cannot read {self.names[index]!r}: {reason}") from None


def open_source(path: Path, *, captions: bool = False, loose: bool = False) -> Source:
    """The pictures at `path`: a folder of them, of .parquet or of .tar files, one such file, or a saved data set.

    captions: labels number texts (metadata, a text column) instead of classes. loose: pictures may lie beside the
    sub-folders of a folder; then there are no classes. Raises ValueError.
    """
    if not path.exists():
        raise ValueError(f"cannot read {str(path)!r}: no such file or folder")
    if path.is_file():
        if path.suffix not in TABLES:
            raise ValueError(f"cannot read {str(path)!r}: must be a folder, a .parquet or a .tar")
        return _open_table(path, [path], captions)
    if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return _open_table(path, [], captions)
    listing = list_folder(path)
    if not listing.pictures and (tables := [table for table in listing.tables if table.parent == path]):
        return _open_table(path, [table for table in tables if table.suffix == tables[0].suffix], captions)
    left_out = listing.left_out
    left_out["archives beside pictures"] += [table.name for table in listing.tables]
    if captions and listing.metadata:
        files, values = by_caption(path, listing)
    elif loose and any(file.parent == path for file in listing.pictures):
        files, values = listing.pictures, []
    else:
        files, values = by_class(path, listing)
    left_out = {reason: names for reason, names in left_out.items() if names}
    if not files:
        where = "in it" if loose else "in its sub-folders, such as CLASS/PICTURE.png"
        found = "".join(f"; {len(names)} {reason}" for reason, names in left_out.items())
        raise ValueError(f"cannot read {str(path)!r}: no pictures {where}{found}")
    labels = number_labels(values, captions=captions and bool(listing.metadata)) if values else None
    return _source(path, labels or Labels([0] * len(files), (), {}), list(map(str, files)), files, files, left_out)


def _source(
    root: Path,
    labels: Labels,
    names: Sequence[str],
    contents: Sequence[Content],
    files: Sequence[Path],
    left_out: dict[str, list[str]] | None = None,
) -> Source:
    return Source(
        root=root,
        names=names,
        contents=contents,
        labels=labels.numbers,
        classes=labels.names,
        files=files,
        faults=labels.faults,
        left_out=left_out or {},
    )


def _open_table(path: Path, files: Sequence[Path], captions: bool) -> Source:
    return (
        _open_tars(path, files, captions) if files and files[0].suffix == ".tar" else _open_rows(path, files, captions)
    )


class Cell(NamedTuple):
    """A picture in a row of a table."""

    column: Any
    row: int

    def read_bytes(self) -> bytes:
        value = self.column[self.row]
        if value is None:
            raise ValueError("no picture in this row")
        return Path(value["path"]).read_bytes() if value["bytes"] is None else value["bytes"]


def _open_rows(path: Path, files: Sequence[Path], captions: bool) -> Source:
    """Columns are found by type and name: the first of pictures; label, cls or class; text, caption or txt."""
    import datasets

    try:
        names = [str(file) for file in files]
        rows = (
            datasets.load_dataset("parquet", data_files=names, split="train")
            if files
            else datasets.load_from_disk(path)
        )
    except Exception as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"cannot read {str(path)!r}: {reason}") from None
    if isinstance(rows, dict):
        raise ValueError(f"cannot read {str(path)!r}: has splits {', '.join(rows)}; give the folder of one of them")
    features = rows.features
    image = next((name for name, kind in features.items() if isinstance(kind, datasets.Image)), None)
    label = next((name for name in (TEXTS if captions else LABELS) if name in features), None)
    if image is None or label is None:
        missing = "of pictures" if image is None else " or ".join(TEXTS if captions else LABELS)
        raise ValueError(f"cannot read {str(path)!r}: no column {missing} among {', '.join(features)}")
    known = features[label].names if isinstance(features[label], datasets.ClassLabel) else ()
    labels = number_labels(list(rows[label]), known, captions=captions)
    column = rows.cast_column(image, datasets.Image(decode=False))[image]
    names = [f"{path}, row {row}" for row in range(len(rows))]
    return _source(
        path, labels, names, [Cell(column, row) for row in range(len(rows))], files or sorted(path.iterdir())
    )


class Member(NamedTuple):
    """A file in a tar."""

    archive: Path
    start: int
    size: int

    def read_bytes(self) -> bytes:
        with self.archive.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


def _open_tars(path: Path, files: Sequence[Path], captions: bool) -> Source:
    """Members are samples by their name up to the first dot: a picture, with .cls, .label, .txt and their kin."""
    samples: dict[str, dict[str, Member]] = {}
    for file in files:
        for name, member in _members(file):
            folder, _, base = name.rpartition("/")
            stem, _, kind = base.partition(".")
            if stem:
                samples.setdefault(f"{file}, {folder and f'{folder}/'}{stem}", {})[kind.lower()] = member
    wanted = TEXTS if captions else LABELS
    pictures = [
        next((m for kind, m in each.items() if f".{kind.rpartition('.')[2]}" in SUFFIXES), None)
        for each in samples.values()
    ]
    texts = [next((m for kind, m in each.items() if kind in wanted), None) for each in samples.values()]
    if not any(texts):
        raise ValueError(f"cannot read {str(path)!r}: no members .{' or .'.join(wanted)}")
    values: list[Any] = [text and text.read_bytes().decode("utf-8-sig", "replace").strip() for text in texts]
    if not captions and all(value.lstrip("-").isdecimal() for value in values if value):
        values = [int(value) if value else None for value in values]
    labels = number_labels(values, captions=captions)
    labels.faults.update({index: "no picture of this name" for index, each in enumerate(pictures) if each is None})
    nothing = Member(path, 0, 0)
    return _source(path, labels, list(samples), [picture or nothing for picture in pictures], files)


def _members(path: Path) -> list[tuple[str, Member]]:
    """The files in a tar. Raises ValueError for one that is cut short, wherever that is."""
    try:
        with tarfile.open(path, "r:") as archive, path.open("rb") as file:
            members = [(each.name, Member(path, each.offset_data, each.size)) for each in archive if each.isfile()]
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("no end of the archive; it is cut short or damaged")
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}") from None
    return members


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
