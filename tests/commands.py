"""`elit` in processes of their own, forked from one that has imported everything already: a start takes no seconds.

For tests of kills, signals and several processes. All others call `elit.cli.main.main` in the test's own process.
"""

import gc
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        *("torch.distributed.checkpoint", "torch.utils.tensorboard", "diffusers", "transformers"),
        *("elit.training.train", "elit.data.encode", "elit.evaluate.sweep", "elit.elastic.distill"),
        *("elit.cli.train", "elit.cli.evaluate", "elit.cli.sweep", "sklearn.datasets", "tyro", "docstring_parser"),
    ]
)

BACKEND = "COMPILE_BACKEND"
"""Environment of a command: torch.compile's, where it is not to be the default."""


class Command:
    def __init__(self, argv: Sequence[object], folder: Path, *, threads: int = 1, rank: int = 0, **environment: str):
        folder.mkdir(parents=True, exist_ok=True)
        self._files = [folder / f"{name}-{rank}-{time.monotonic_ns()}.txt" for name in ("out", "err")]
        settings = (list(map(str, argv)), list(map(str, self._files)), threads, environment, os.getcwd())
        self.process = _SERVER.Process(target=_run, args=settings)
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def out(self) -> str:
        return self._files[0].read_text()

    @property
    def err(self) -> str:
        return self._files[1].read_text()

    def wait(self, timeout: float = 600) -> int:
        """The exit code; minus the signal's number if one ended it."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s: {self.err}"
        return self.process.exitcode

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Looks every few milliseconds; a command that ends before is a failure."""
        while not happened():
            assert self.process.is_alive(), f"ended with {self.process.exitcode}: {self.err}"
            time.sleep(0.002)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def _run(argv: list[str], files: list[str], threads: int, environment: dict[str, str], cwd: str) -> None:
    gc.set_threshold(50_000)
    gc.freeze()  # what was there before the fork stays, and its pages stay shared
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    os.chdir(cwd)
    import torch

    from elit.cli.main import main

    torch.set_num_threads(threads)
    if backend := environment.get(BACKEND):
        torch.compile = partial(torch.compile, backend=backend)
    sys.exit(main(argv))


def start_two(argv: Sequence[object], folder: Path, **environment: str) -> list[Command]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    group |= environment
    return [Command(argv, folder, rank=rank, **group, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]


def run_two(argv: Sequence[object], folder: Path, **environment: str) -> list[Command]:
    commands = start_two(argv, folder, **environment)
    for command in commands:
        assert command.wait() == 0, command.err
    return commands
