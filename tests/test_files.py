"""Files are there whole or not at all."""

import os
import shutil
import zlib

import pytest

from elit.files import fingerprint, replacing, whole_folder, write_folder, write_text


def test_a_file_appears_when_its_block_is_through(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()
    write_text(path, "zwölf")
    assert path.read_text(encoding="utf-8") == "zwölf"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("concurrent", [False, True])
def test_a_write_that_fails_leaves_the_file_before_it_and_nothing_else(tmp_path, concurrent):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail():
        with replacing(path, concurrent=concurrent) as temporary:
            temporary.write_text("ha")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_writers_at_the_same_time_have_names_of_their_own(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    with replacing(path, concurrent=True) as one:
        monkeypatch.setattr("os.getpid", lambda: 1)
        with replacing(path, concurrent=True) as other:
            assert one != other
            one.write_text("one")
            other.write_text("other")
        assert path.read_text() == "other"
    assert path.read_text() == "one"


def test_a_folder_that_fails_leaves_the_old_one(tmp_path):
    def fail(folder):
        (folder / "half").write_text("half")
        raise OSError("disk full")

    write_folder(tmp_path / "a", lambda folder: (folder / "x").write_text("old"))
    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path / "a", fail)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x"]


class Killed(BaseException):
    """As a SIGKILL: nothing after it runs, not even what cleans up."""


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_at_any_point_loses_no_folder(tmp_path, monkeypatch, renames):
    """Before, between and after the two renames: the old or the new one is found whole, and a later write goes on."""
    folder, left = tmp_path / "a", iter(range(renames))
    write_folder(folder, lambda at: (at / "x").write_text("old"))
    replace, remove = os.replace, shutil.rmtree

    def replace_or_die(*paths):
        if next(left, None) is None:
            raise Killed
        replace(*paths)

    def remove_or_die(path, **options):
        if (folder / "x").read_text() == "new":
            raise Killed
        remove(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", replace_or_die)
        patch.setattr("shutil.rmtree", remove_or_die)
        with pytest.raises(Killed):
            write_folder(folder, lambda at: (at / "x").write_text("new"))
    assert (whole_folder(folder) / "x").read_text() == ("new" if renames == 2 else "old")

    def fail(at):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):  # the next call keeps what the kill left
        write_folder(folder, fail)
    assert (folder / "x").read_text() == ("new" if renames == 2 else "old")
    write_folder(folder, lambda at: (at / "x").write_text("newer"))
    assert (folder / "x").read_text() == "newer"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_fingerprint_is_size_and_crc(tmp_path):
    (tmp_path / "a").write_bytes(b"elastic" * 1000)
    assert fingerprint(tmp_path / "a") == [7000, zlib.crc32(b"elastic" * 1000)]
