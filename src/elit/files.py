"""Files that appear whole or not at all: written under a temporary name in the same folder, then renamed."""

import os
import re
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Json = dict[str, Any]  # A JSON object, or other values by name.


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write to, renamed to `path` at the end of the block, removed if it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with _system_errors(path, temporary):
            yield temporary
            os.replace(temporary, path)
    except BaseException:  # an interrupt leaves no half-written file either
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def _system_errors(path: Path, temporary: Path) -> Iterator[None]:
    """Makes errors of the system name `path`; safetensors, in Rust, has an error class of its own for a full disk."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if found := re.search(r"I/O error.*\(os error (\d+)\)", str(error)):
            number = int(found[1])
        of_another = getattr(error, "filename", None) and str(temporary) not in str(error.filename)
        if number is None or of_another:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def check_new_output(
    path: Path, *, overwrite: bool, folder: bool = False, mine: Callable[[str], bool] | None = None, name: str = "out"
) -> None:
    """Raises ValueError unless a command may write the file or folder `path`, given by the option `name`."""
    is_folder = path.is_dir()
    names = sorted(entry.name for entry in path.iterdir()) if is_folder else []
    other = [each for each in names if mine and not mine(each)]
    taken = bool(names) if is_folder else path.exists() or path.is_symlink()
    real = Path(os.path.realpath(path))  # `resolve` raises where links go in circles
    fault = None
    if real in (Path.cwd(), *Path.cwd().parents):
        fault = "it is the current folder, or above it; give a name"
    elif is_folder and not folder:
        fault = "it is a folder; give the name of a file"
    elif taken and folder and not is_folder:
        fault = "it is a file; give the name of a folder"
    elif taken and not overwrite:
        fault = "it exists; give another name, or --overwrite to replace it"
    elif other:
        fault = f"it holds {other[0]!r}, which this command has not written; give another folder"
    if fault:
        raise ValueError(f"cannot write {name}={str(path)!r}: {fault}")
    check_writable(path, name)


def check_writable(path: Path, name: str = "out") -> None:
    """Raises ValueError unless the first name that `path` takes, or one in this folder, can be made for a moment."""
    missing = path.absolute() / "file" if path.is_dir() else path.absolute()
    while not missing.parent.exists() and not missing.parent.is_symlink():
        missing = missing.parent
    above = missing.parent
    fault = f"{str(above)!r} is a {'link to nothing' if above.is_symlink() else 'file'}"
    if above.is_dir():
        probe, fault = _temporary(missing), ""
        try:
            probe.mkdir()
            probe.rmdir()
        except OSError as error:
            fault = f"{error.strerror} in {str(above)!r}"
    if fault:
        raise ValueError(f"cannot write {name}={str(path)!r}: {fault}; give another place")


@contextmanager
def leaving_nothing(folder: Path, *, unless: str | None = None) -> Iterator[None]:
    """Removes `folder` and those above it, where new, if the block raises ValueError before it has a file `unless`."""
    new = [path for path in (folder.absolute(), *folder.absolute().parents) if not path.exists()]
    try:
        yield
    except ValueError:
        if new and not (unless and (folder / unless).exists()):
            shutil.rmtree(new[-1], ignore_errors=True)
        raise


def read_text(path: Path) -> str:
    """Text in UTF-8 or, where a mark at its start says so, UTF-16. Raises ValueError."""
    content = path.read_bytes()
    try:
        return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"cannot read {str(path)!r}: must be UTF-8 or UTF-16 text") from None


def read_lines(path: Path) -> list[str]:
    """The lines of a text that hold something; U+2028 and its like belong to a line."""
    return [line.removesuffix("\r") for line in read_text(path).split("\n") if line.strip()]


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary folder, then puts it in the place of `folder`, in two renames."""
    temporary, old = _temporary(folder), folder.with_name(f".{folder.name}.old")
    if old.is_dir() and not folder.exists():
        os.replace(old, folder)
    temporary.mkdir(parents=True)
    try:
        with _system_errors(folder, temporary):
            write(temporary)
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                os.replace(folder, old)
            os.replace(temporary, folder)
    except BaseException:  # as in `replacing`
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def whole_folder(folder: Path) -> Path:
    """The folder to read: `folder`, or the old one where a kill has left no other."""
    old = folder.with_name(f".{folder.name}.old")
    return old if old.is_dir() and not folder.exists() else folder


def fingerprint(path: Path) -> list[int]:
    """Size and CRC-32 of a file."""
    total = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            total = zlib.crc32(block, total)
    return [path.stat().st_size, total]
