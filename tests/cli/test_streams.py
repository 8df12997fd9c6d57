"""Streams and ports of commands: a reader that leaves, a full disk, no stdout, few characters, a port in use."""

import os
import socket
import subprocess
import sys

import pytest

from elit.cli.main import free_port, main


def run(line, stdout=subprocess.PIPE, before="", **environment):
    command = ["/bin/sh", "-c", f'exec "$@" {before}', "sh", sys.executable, "-m", "elit", *line.split()]
    environment = os.environ | {"PYTHONUNBUFFERED": ""} | environment
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env=environment, check=False)
    return done.returncode, (done.stdout or b"").decode(), done.stderr.decode()


@pytest.mark.parametrize("line", ["--help", "recipes --json"])
def test_output_that_nobody_reads_is_no_fault_and_a_full_disk_is_told(line):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        assert run(line, stdout=writing)[::2] == (1, "")
    finally:
        os.close(writing)
    assert run(line, before=">&-") == (0, "", "")
    if os.path.exists("/dev/full"):
        code, _, error = run(line, before="> /dev/full")
        assert (code, error.count("\n"), error[:4]) == (1, 1, "elit")
        assert "No space left on device" in error


def test_ctrl_c_while_a_command_is_imported(capsys, monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("elit.cli.main.import_module", interrupted)
    assert main(["sample", "x"]) == 130
    assert capsys.readouterr().err == "elit sample: stopped\n"


def test_ports_that_are_taken_and_hosts_that_do_not_exist():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=rf"^cannot listen at host='127.0.0.1', port={port}: .*already in use"):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", port) == port
    assert 0 < free_port("127.0.0.1", 0) < 65536
    for host, port in (("203.0.113.1", 0), ("\ufff9", 0), ("a\0b", 0), ("a" * 70, 0), ("127.0.0.1", 70000)):
        with pytest.raises(ValueError, match=r"^cannot listen at host="):
            free_port(host, port)
