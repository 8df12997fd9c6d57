"""`elit COMMAND ...`: finds the command's module, parses its arguments, and turns bad input into one line."""

import contextlib
import difflib
import errno
import io
import json
import keyword
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from elit._version import __version__
from elit.config import require
from elit.files import check_writable
from elit.pretrained import model_folder

COMMANDS = {
    "quickstart": "train a small model on digits, turn its dial, write a report (two to four minutes)",
    "encode": "turn images or clips into an autoencoder's latents, once",
    "recipes": "the training runs that come with the package, for elit train --config recipe:NAME",
    "train": "train a model on digits or a folder of images",
    "import": "turn a published checkpoint into a saved model",
    "distill": "give a pretrained pipeline or model a dial: train it to work on fewer tokens",
    "sample": "make images with a trained model at any budget",
    "evaluate": "score a model's samples, or any pictures: FID, FDD, IS, KID, precision, recall, FVD, accuracy",
    "sweep": "score a model over budgets, steps and guidances: table, Pareto front, plots, report, model card",
    "serve": "serve images over OpenAI's API with a budget that follows the load",
    "loadtest": "send a service requests as they would come, and say what became of them",
    "profile": "measure what a model takes on this machine, for plans that meet a time",
    "inspect": "look inside a model: what Read reads beside the loss, which latents matter, every budget",
    "flops": "what a model costs at each budget",
    "play": "open a page: turn the budget, compare, plan, look inside",
    "doctor": "what is installed here, what works and what is fast",
}

MOVED = {
    "tune-schedule": "python studies/tune_schedule.py, in this library's repository",
    "elastify": "elit distill MODEL OUT --data DATA, which takes this library's own networks too",
}
"""Commands of earlier versions, and what does their work now."""

BAD_PLACE = {
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG),
    errno.ELOOP,
}
"""What the system says of a path that is bad input."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 1 for a failed run, 2 for bad input, 130 for one that was stopped."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with _forgiving_output():
        if not arguments or arguments[0] in ("-h", "--help"):
            print(_overview())
            return 0
        if arguments[0] == "--version":
            print(f"elit {__version__}")
            return 0
        return _run(arguments[0], arguments[1:])


def _run(name: str, arguments: Sequence[str]) -> int:
    if name in MOVED:
        return _fail(f"elit {name}: moved; use {MOVED[name]}", 2)
    if name not in COMMANDS:
        close = difflib.get_close_matches(name.lower().replace("_", "-"), COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return _fail(f"elit: unknown command {name!r}; {hint}commands: {', '.join(COMMANDS)}", 2)
    # No module can be named by a word of Python's own: those have a line behind.
    module = f"{name}_" if keyword.iskeyword(name) else name.replace("-", "_")
    try:
        command = import_module(f"elit.cli.{module}")
        args = command.parse(arguments) if hasattr(command, "parse") else parse(command.Args, name, arguments)
        result = command.run(args)
    except ValueError as error:
        return _fail(f"elit {name}: {' '.join(str(error).split())}", 2)
    except BrokenPipeError:
        raise
    except (OSError, FloatingPointError) as error:
        if isinstance(error, OSError) and error.errno in BAD_PLACE:
            where = f"{str(error.filename)!r}: " if error.filename else ""
            return _fail(f"elit {name}: {where}cannot be used ({error.strerror}); give another place", 2)
        return _fail(f"elit {name}: {' '.join(str(error).split())}", 1)
    except KeyboardInterrupt:
        return _fail(f"elit {name}: stopped", 130)
    if args.json and result is not None:  # of several processes, the main one speaks
        print(json.dumps(result))
    return 0


@contextlib.contextmanager
def _forgiving_output() -> Iterator[None]:
    """Inside the block stdout is there, even if it was closed, and takes any character; what it cannot write is a '?'.

    Exits with 1 where not all could be written: without a word where the reader has gone, as `head` does.
    """
    with contextlib.ExitStack() as stack:
        stdout: TextIO | None = sys.stdout
        if stdout is None:  # closed by who started this process
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
                stream.reconfigure(errors="replace")
        try:
            try:
                yield
            finally:
                sys.stdout.flush()
        except OSError as error:
            # Python would try once more at its end, and say so.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if not isinstance(error, BrokenPipeError):
                _fail(f"elit: stdout: {error.strerror}", 1)
            raise SystemExit(1) from None


def parse(kind: Any, name: str, arguments: Sequence[str], **options: Any) -> Any:
    """The dataclass `kind` filled from `arguments`. Raises ValueError with one line for what does not fit.

    tyro explains itself in a box on stderr; a command that fails says one line.
    """
    import tyro

    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            args = tyro.cli(kind, prog=f"elit {name}", args=list(arguments), **options)
    except SystemExit as stop:
        if stop.code != 2:
            raise
        raise ValueError(_one_line(output.getvalue(), name)) from None
    for field, value in vars(args).items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float):
                require(math.isfinite(number), field, number, "finite")
    # A model may be named instead: one in the package.
    given = {field: getattr(args, field, None) for field in ("model", "pictures")}
    boxed = {field: model_folder(folder) for field, folder in given.items() if folder is not None}
    return replace(args, **boxed) if boxed else args


def check_output(out: Path, name: str = "out") -> None:
    """Raises ValueError where nothing can be written at `out`, or in it where it is a folder."""
    check_writable(out / "file" if out.is_dir() or out.is_symlink() else out, name)


def check_device(name: str | None) -> str:
    """The device as given, or the best here. Raises ValueError where this machine has no such device."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # a meta tensor has no value
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name!r}: not usable here ({reason}); elit doctor lists what is") from None
    return name


@contextlib.contextmanager
def show_progress(what: str, total: int) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr to be told (done, total); None, and nothing shown, where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def show_notes(name: str) -> Iterator[None]:
    """Prints what to know before believing a score as a line on stderr, each once."""
    from elit.evaluate import EvaluationWarning

    printed: set[str] = set()

    def say(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if not issubclass(category, EvaluationWarning):
            others(message, category, *rest, **more)
        elif str(message) not in printed:
            printed.add(str(message))
            print(f"elit {name}: note: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", EvaluationWarning)
        others, warnings.showwarning = warnings.showwarning, say
        yield


def _one_line(box: str, name: str) -> str:
    """What tyro says in its box first, without frame, title and advice; a plain box has its title inside."""
    sections: list[list[str]] = [[]]
    for line in box.splitlines():
        line = re.sub(r"\x1b\[[0-9;]*m", "", line).strip(" │")
        if line and set(line) <= set("─-"):
            sections.append([])
        elif line and line[0] not in "╭╰":
            sections[-1].append(line)
    reason = sections[0 if "╭" in box else 1]
    message = re.sub(r"^Error parsing (?!--)\S+: ", "", " ".join(" ".join(reason).split()))
    return f"{message} (see elit {name} --help)"


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: elit COMMAND [options]",
            "",
            "Diffusion transformers with a compute dial.",
            "",
            *lines,
            "",
            "Every command has --help, and --json for machine-readable results last on stdout.",
            "Example: elit quickstart",
        ]
    )


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
