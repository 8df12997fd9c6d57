"""Files that appear whole or not at all, and what tells whether one is as it was written.

Everything this library writes goes through here: first under a temporary name in the same folder, then renamed.
A reader, or a run that was killed, never meets half a file.
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

LONG_AGO = 24 * 3600.0
"""Seconds after which nobody writes a temporary file any more."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write to; renames it to `path` at the end of the block.

    Makes the folder. If the block raises, the temporary file is removed and `path` stays as it was. Of several that
    write the same file at the same time, the last one's is there in the end, whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with _of_the_system(path, temporary):
            yield temporary
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def _of_the_system(path: Path, temporary: Path) -> Iterator[None]:
    """Inside the block, an error of the system while `path` is written names `path`, and is an OSError.

    Those of libraries in Rust, such as safetensors, are errors of their own; a full disk is one to the user.
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
    """Whether a command may write `path`, asked before its work. Raises ValueError, or an error of the system.

    folder: it writes a folder there, otherwise a file. mine: whether a name in that folder is of such a command; what
    holds anything else is not replaced even with `overwrite`. name: of the option.
    """
    argument = f"{name}={str(path)!r}"
    real = Path(os.path.realpath(path))  # `resolve` raises where links go in circles
    if real in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(f"{argument}: is the folder you are in, or above it; give a name")
    if folder and path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())
        if names and not overwrite:
            raise ValueError(f"{argument}: is there already; give another name, or --overwrite to replace it")
        if mine is not None and (other := [each for each in names if not mine(each)]):
            raise ValueError(f"{argument}: holds {other[0]!r}, which this command has not written; give another folder")
    elif path.is_dir():
        raise ValueError(f"{argument}: is a folder; give the name of a file")
    elif path.exists() or path.is_symlink():
        if folder:
            raise ValueError(f"{argument}: is a file; give the name of a folder")
        if not overwrite:
            raise ValueError(f"{argument}: is there already; give another name, or --overwrite to replace it")
    check_writable(path, name)


def check_writable(path: Path, name: str = "out") -> None:
    """Whether a file or folder can be made at `path`, by making the first that it takes, and removing it again.

    A mode does not tell: root may write where it says no, and nobody on what is mounted to be read. Raises ValueError.
    """
    missing = path.absolute()
    while not missing.parent.exists():
        missing = missing.parent
    if missing != path.absolute() and missing.is_symlink():
        raise ValueError(f"{name}={str(path)!r}: {str(missing)!r} is a link to nothing; give another place")
    if not missing.parent.is_dir():
        raise ValueError(
            f"{name}={str(path)!r}: cannot write there, {str(missing.parent)!r} is a file; give another place"
        )
    probe = _temporary(missing)
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise ValueError(
            f"{name}={str(path)!r}: cannot write there, {error.strerror} in {str(missing.parent)!r}; give another place"
        ) from None


@contextmanager
def leaving_nothing(folder: Path, *, unless: str | None = None) -> Iterator[None]:
    """Removes `folder`, with what was made above it, if the block raises a ValueError and it was not there before.

    For work that is kept when it is killed: what was refused is nothing to go on with. unless: a file with which the
    work begins; where it is in the folder, all stays.
    """
    new = [path for path in (folder.absolute(), *folder.absolute().parents) if not path.exists()]
    try:
        yield
    except ValueError:
        if new and not (unless and (folder / unless).exists()):
            shutil.rmtree(new[-1], ignore_errors=True)
        raise


def existing(value: str | Path, name: str) -> Path:
    """`value` as a path that can be asked whether it is there. Raises ValueError for one that is too long for that."""
    if not isinstance(value, str | Path) or "\0" in str(value):
        raise ValueError(f"{name}={' '.join(repr(value).split())[:80]}: give a name or a path")
    path = Path(value)
    try:
        path.exists()
    except OSError as error:
        raise ValueError(f"{name}={str(value)[:60]!r}...: {error.strerror}") from None
    return path


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_folder(folder: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` fill a temporary folder, then puts it in the place of `folder`.

    That takes two renames. A kill between them leaves the one before as `.NAME.old`, and nothing at `folder`.
    `whole_folder` finds it there, and the next call puts it back before it writes. Of several that write the same
    folder at the same time, the last one's is there in the end, whole.
    """
    temporary, old = _temporary(folder), _set_aside(folder)
    if old.is_dir() and not folder.exists():
        os.replace(old, folder)
    temporary.mkdir(parents=True)
    try:
        with _of_the_system(folder, temporary):
            write(temporary)
            _put_in_place(temporary, folder, old)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _put_in_place(temporary: Path, folder: Path, old: Path) -> None:
    """Renames `folder` to `old` and `temporary` to `folder`; once more where another writer comes between."""
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
    """Where to read what `write_folder` wrote: `folder`, or where a kill has left the one before."""
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
