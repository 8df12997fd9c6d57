"""Where pictures to encode come from: a folder, or anything Hugging Face `datasets` reads from this machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from elit.data.images import list_files, read_frames


@dataclass(frozen=True)
class Example:
    """One picture, or the frames of one clip, and the number of its class or caption."""

    frames: list[Image.Image]
    label: int


class Source(Protocol):
    """Examples in an order that never changes."""

    classes: tuple[str, ...]
    captions: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Raises OSError or ValueError for a picture that cannot be read."""
        ...

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of a picture in pixels, upright. Raises as `__getitem__` does."""
        ...

    def describe(self) -> dict[str, Any]:
        """What identifies the source and its order, as JSON."""
        ...


class FolderSource:
    """Images of a folder as `list_files` lists them, opened when asked for."""

    def __init__(self, root: Path, *, captions: bool, loose: bool = False):
        self.root = root
        files, self.classes = list_files(root, captions=captions, loose=loose)
        self.files, self.labels = [path for path, _ in files], [label for _, label in files]
        self.captions = tuple(name.replace("_", " ") for name in self.classes)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        return Example(read_frames(self.files[index]), self.labels[index])

    def size(self, index: int) -> tuple[int, int]:
        with Image.open(self.files[index]) as image:
            return _upright_size(image)

    def describe(self) -> dict[str, Any]:
        return {"folder": str(self.root), "files": [str(path.relative_to(self.root)) for path in self.files]}


class TableSource:
    """Rows of local parquet files, webdataset tars or a folder that `datasets` saved; decoded when asked for.

    Columns are found by their type and name: the first with images; label, cls, class; text, caption, txt.
    Raises ValueError where there are none to be found.
    """

    def __init__(self, path: Path, *, captions: bool):
        import datasets

        self.path = path
        self.files = sorted(path.glob("*.parquet")) + sorted(path.glob("*.tar")) if path.is_dir() else [path]
        kind = {".parquet": "parquet", ".tar": "webdataset"}.get(self.files[0].suffix) if self.files else None
        names = [str(file) for file in self.files]
        rows = datasets.load_dataset(kind, data_files=names, split="train") if kind else datasets.load_from_disk(path)
        if isinstance(rows, dict):
            raise ValueError(f"src={str(path)!r}: has splits {', '.join(rows)}; give the folder of one of them")
        features = rows.features
        image = next((name for name, kind in features.items() if isinstance(kind, datasets.Image)), None)
        if image is None:
            raise ValueError(f"src={str(path)!r}: no column of images among {', '.join(features)}")
        wanted = ("text", "caption", "txt") if captions else ("label", "cls", "class")
        label = next((name for name in wanted if name in features), None)
        if label is None:
            raise ValueError(f"src={str(path)!r}: none of the columns {', '.join(wanted)} among {', '.join(features)}")
        self.rows, self.image = rows, image
        values = list(rows[label])
        if isinstance(features[label], datasets.ClassLabel):
            self.classes, self.labels = tuple(features[label].names), values
        elif not captions and all(isinstance(value, int) for value in values):
            self.classes, self.labels = tuple(map(str, range(max(values) + 1))), values
        else:
            names = list(dict.fromkeys(map(str, values)))
            numbers = {name: number for number, name in enumerate(names)}
            self.classes, self.labels = tuple(names), [numbers[str(value)] for value in values]
        self.captions = tuple(name.replace("_", " ") for name in self.classes)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return Example([self.rows[index][self.image]], self.labels[index])

    def size(self, index: int) -> tuple[int, int]:
        return _upright_size(self.rows[index][self.image])

    def describe(self) -> dict[str, Any]:
        files = [[file.name, file.stat().st_size] for file in self.files]
        return {"table": str(self.path), "files": files, "rows": len(self)}


class Subset:
    """Some rows of a source."""

    def __init__(self, source: Source, rows: Sequence[int]):
        self.source, self.rows = source, list(rows)
        self.classes, self.captions = source.classes, source.captions

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.source[self.rows[index]]

    def size(self, index: int) -> tuple[int, int]:
        return self.source.size(self.rows[index])

    def describe(self) -> dict[str, Any]:
        return {"of": self.source.describe(), "rows": self.rows}


SIDEWAYS = (5, 6, 7, 8)  # values of EXIF's orientation
ORIENTATION = 0x0112


def _upright_size(image: Image.Image) -> tuple[int, int]:
    turned = image.getexif().get(ORIENTATION) in SIDEWAYS
    return (image.width, image.height) if turned else (image.height, image.width)


def open_source(path: Path, *, captions: bool) -> Source:
    """The source at `path`: a folder of images or of .parquet or .tar files, one such file, or a saved dataset.

    captions: labels number texts (metadata.jsonl, a text column) instead of classes. Raises ValueError.
    """
    if not path.exists():
        raise ValueError(f"src={str(path)!r}: no such file or folder")
    if is_table(path):
        return TableSource(path, captions=captions)
    if path.is_file():
        raise ValueError(f"src={str(path)!r}: give a folder, a .parquet or a .tar")
    return FolderSource(path, captions=captions)


def is_table(path: Path) -> bool:
    """Whether `datasets` reads it: a .parquet or .tar file, a folder of them, or one that `datasets` saved."""
    tables = (".parquet", ".tar")
    if path.is_file():
        return path.suffix in tables
    saved = any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
    return saved or any(file.suffix in tables for file in path.iterdir())
