"""Files are there whole or not at all."""

import os
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError

from elit.files import check_writable, read_lines, replacing, whole_folder, write_folder, write_text


def test_a_file_appears_whole_beside_other_writers_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with replacing(path) as one:
        one.write_text("one")
        assert not path.exists()
        write_text(path, "zwölf")
        assert path.read_text(encoding="utf-8") == "zwölf"
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        _ = temporary.write_text("ha") / 0
    assert path.read_text() == "one"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_a_full_disk_is_an_error_of_the_system_that_names_the_file(tmp_path):
    """Whatever library meets it; safetensors has an error of its own."""

    def with_safetensors(path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def with_python(path):
        with path.open("w") as file:
            file.write("x" * (1 << 20))

    def full(path, write):
        path.symlink_to("/dev/full")
        write(path)

    for write in (with_safetensors, with_python):
        says = rf"\[Errno 28\] No space left on device: '{tmp_path}/x'"
        with pytest.raises(OSError, match=says), replacing(tmp_path / "x") as temporary:
            full(temporary, write)
        with pytest.raises(OSError, match=says):
            write_folder(tmp_path / "x", lambda at, write=write: full(at / "y", write))
    assert not list(tmp_path.iterdir())


def test_a_place_where_nothing_can_be_written_is_told(tmp_path):
    check_writable(tmp_path / "new" / "deep" / "x.png")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("link")
    for place, says in (
        (tmp_path / "file" / "x", r"'.*file/x': '.*file' is a file; give another place"),
        (tmp_path / "link" / "x", r"'.*link/x': '.*link' is a link to nothing; give another"),
        (tmp_path / ("x" * 250), r".*: File name too long in "),
        *([(Path("/proc/x/y"), "'/proc/x/y': ")] if Path("/proc").is_dir() else []),  # nobody can, whatever its mode
    ):
        with pytest.raises(ValueError, match=f"cannot write to={says}"):
            check_writable(place, "to")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


class Killed(BaseException):
    """As a SIGKILL: nothing after it runs, not even what cleans up."""


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_at_any_point_loses_no_folder(tmp_path, monkeypatch, renames):
    """Before, between and after the two renames: the old or the new one is found whole, and a later write goes on."""
    folder, left = tmp_path / "a", iter(range(renames))
    write_folder(folder, lambda at: (at / "x").write_text("old"))
    replace, remove, dead = os.replace, shutil.rmtree, []

    def replace_or_die(*paths):
        if next(left, None) is None:
            dead.append(True)
            raise Killed
        replace(*paths)

    def remove_or_die(path, **options):
        if dead or (folder / "x").read_text() == "new":
            raise Killed
        remove(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", replace_or_die)
        patch.setattr("shutil.rmtree", remove_or_die)
        with pytest.raises(Killed):
            write_folder(folder, lambda at: (at / "x").write_text("new"))
    assert (whole_folder(folder) / "x").read_text() == ("new" if renames == 2 else "old")
    with pytest.raises(ZeroDivisionError):  # the next call keeps what the kill left
        write_folder(folder, lambda at: 1 / 0)
    assert (folder / "x").read_text() == ("new" if renames == 2 else "old")
    write_folder(folder, lambda at: (at / "x").write_text("newer"))
    assert (folder / "x").read_text() == "newer"
    assert [path for path in tmp_path.iterdir() if path.suffix != ".tmp"] == [folder]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lines_end_where_a_line_ends(tmp_path, encoding):
    """At no other mark that Unicode calls a separator."""
    (tmp_path / "a.txt").write_bytes("a\u2028b\r\n\nc\x85d\x0ce\n\n".encode(encoding))
    assert read_lines(tmp_path / "a.txt") == ["a\u2028b", "c\x85d\x0ce"]
    (tmp_path / "a.txt").write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match=r"cannot read '.*a\.txt': must be UTF-8"):
        read_lines(tmp_path / "a.txt")
