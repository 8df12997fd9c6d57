"""Where commands print: to a reader that leaves, a full disk, nobody, or a terminal of few characters."""

import os
import subprocess
import sys

import pytest

from elit.cli.main import main

LINES = [["--help"], ["recipes"], ["recipes", "--json"], ["import", "--help"]]
ASCII = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}


def run(line, stdout=subprocess.PIPE, before="", **environment):
    """`elit LINE` in a process of its own, whose shell says `before` of its streams."""
    command = ["/bin/sh", "-c", f'exec "$@" {before}', "sh", sys.executable, "-m", "elit", *line]
    environment = os.environ | {"PYTHONUNBUFFERED": ""} | environment
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env=environment, check=False)
    return done.returncode, (done.stdout or b"").decode(), done.stderr.decode()


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_output_that_nobody_reads_is_no_fault(line):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        assert run(line, stdout=writing)[::2] == (1, "")
    finally:
        os.close(writing)
    assert run(line, before=">&-") == (0, "", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_output_that_finds_no_room_is_told_in_a_line(line):
    code, _, error = run(line, before="> /dev/full")
    assert (code, error.count("\n")) == (1, 1)
    assert error.startswith("elit")
    assert "No space left on device" in error


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_characters_that_a_terminal_lacks_stop_nothing(line):
    code, out, error = run(line, **ASCII)
    assert (code, error) == (0, "")
    assert out
    assert out.isascii()


def test_ctrl_c_while_a_command_is_imported(capsys, monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("elit.cli.main.import_module", interrupted)
    assert main(["sample", "x"]) == 130
    assert capsys.readouterr().err == "elit sample: stopped\n"


@pytest.mark.parametrize(("name", "close"), [("SAMPLE", "sample"), ("loadtset", "loadtest"), ("evalute", "evaluate")])
def test_a_command_that_is_close_is_named(capsys, name, close):
    assert main([name]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"elit: unknown command {name!r}; did you mean {close!r}? commands: quickstart, ")
    assert error.count("\n") == 1
