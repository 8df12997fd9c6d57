"""Files that appear whole or not at all.

This library writes everything through this module: under a temporary name in the same folder first, then renamed. So no
reader, and no run that was killed, ever meets half a file.
"""

import errno
import os
import re
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

Json = dict[str, Any]
"""A JSON object, or other values by name."""
LONG_AGO = 24 * 3600.0
"""Seconds after which a temporary file has no writer any more."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write to, and renames it to `path` at the end of the block.

    Makes the folder. If the block raises, the temporary file is removed and `path` stays as it was. When several write
    one file at the same time, the last one's is there in the end, whole.
    """
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
    """Makes errors of the system OSErrors that name `path`, while it is written under its temporary name.

    Libraries in Rust, such as safetensors, have error classes of their own, for a full disk too.
    """
    try:
        yield
    except OSError as error:
        unnamed = error.filename is None or str(temporary) in str(error.filename)
        if error.errno is not None and error.filename2 is None and unnamed:
            error.filename = str(path)
        raise
    except Exception as error:
        if number := re.search(r"I/O error.*\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise


def _temporary(path: Path) -> Path:
    """A name beside `path` that no other writer has. Removes what writers of `path` left that were killed long ago."""
    for left in path.parent.glob(f".{escape(path.name)}.{'[0-9a-f]' * 8}.tmp"):
        with suppress(OSError):  # another writer may remove it too
            if time.time() - left.lstat().st_mtime > LONG_AGO:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def check_new_output(
    path: Path, *, overwrite: bool, folder: bool, mine: Callable[[str], bool] | None = None, name: str = "out"
) -> None:
    """Checks, before its work, that a command may write `path`. Raises ValueError, or an error of the system.

    folder: the output is a folder, otherwise a file. mine: tells names that such a command writes in its folder; a
    folder with any other name is not replaced even with `overwrite`. name: of the option.
    """
    real = Path(os.path.realpath(path))  # `resolve` raises where links go in circles
    exists = "it exists; give another name, or --overwrite to replace it"
    fault = None
    if real in (Path.cwd(), *Path.cwd().parents):
        fault = "it is the current folder, or above it; give a name"
    elif folder and path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())
        other = [] if mine is None else [each for each in names if not mine(each)]
        if names and not overwrite:
            fault = exists
        elif other:
            fault = f"it holds {other[0]!r}, which this command has not written; give another folder"
    elif path.is_dir():
        fault = "it is a folder; give the name of a file"
    elif path.exists() or path.is_symlink():
        fault = "it is a file; give the name of a folder" if folder else None if overwrite else exists
    if fault:
        raise ValueError(f"cannot write {name}={str(path)!r}: {fault}")
    check_writable(path, name)


def check_writable(path: Path, name: str = "out") -> None:
    """Checks that a file or folder can be made at `path`, by making the first one it takes, and removing it again.

    A mode is not enough: root may write where it forbids it, and nobody on a read-only mount. Raises ValueError.
    """
    missing = path.absolute()
    while not missing.parent.exists():
        missing = missing.parent
    above, fault = str(missing.parent), None
    if missing != path.absolute() and missing.is_symlink():
        fault = f"{str(missing)!r} is a link to nothing"
    elif not missing.parent.is_dir():
        fault = f"{above!r} is a file"
    else:
        probe = _temporary(missing)
        try:
            probe.mkdir()
            probe.rmdir()
        except OSError as error:
            fault = f"{error.strerror} in {above!r}"
    if fault:
        raise ValueError(f"cannot write {name}={str(path)!r}: {fault}; give another place")


@contextmanager
def leaving_nothing(folder: Path, *, unless: str | None = None) -> Iterator[None]:
    """Removes `folder`, and the folders made above it, if the block raises a ValueError and it was not there before.

    For work that survives kills: a refused run has nothing to resume. unless: a file with which the work begins; if
    the folder has it, everything stays.
    """
    new = [path for path in (folder.absolute(), *folder.absolute().parents) if not path.exists()]
    try:
        yield
    except ValueError:
        if new and not (unless and (folder / unless).exists()):
            shutil.rmtree(new[-1], ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary folder, then puts it in the place of `folder`.

    That takes two renames. A kill between them leaves the old folder as `.NAME.old`, and nothing at `folder`:
    `whole_folder` finds it there, and the next call puts it back before it writes. When several write one folder at
    the same time, the last one's is there in the end, whole.
    """
    temporary, old = _temporary(folder), _set_aside(folder)
    if old.is_dir() and not folder.exists():
        os.replace(old, folder)
    temporary.mkdir(parents=True)
    try:
        with _system_errors(folder, temporary):
            write(temporary)
            _put_in_place(temporary, folder, old)
    except BaseException:  # as in `replacing`
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _put_in_place(temporary: Path, folder: Path, old: Path) -> None:
    """Renames `folder` to `old` and `temporary` to `folder`; tries again where another writer comes between."""
    for left in reversed(range(100)):
        try:
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.replace(folder, old)
            os.replace(temporary, folder)
            return
        except OSError as error:
            if not left or error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise


def whole_folder(folder: Path) -> Path:
    """The folder to read: `folder`, or the old one where a kill has left no other."""
    old = _set_aside(folder)
    return old if old.is_dir() and not folder.exists() else folder


def _set_aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def fingerprint(path: Path) -> list[int]:
    """Size and CRC-32 of a file."""
    total = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            total = zlib.crc32(block, total)
    return [path.stat().st_size, total]
