"""`elit COMMAND ...`: finds the command's module, parses its `Args`, calls its `run`; bad input becomes one line."""

import contextlib
import difflib
import errno
import io
import itertools
import json
import keyword
import math
import os
import re
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from elit._version import __version__
from elit.config import require
from elit.pretrained import model_folder

COMMANDS = {
    "quickstart": "train a small model on digits, sample at every budget, write a report (two to four minutes)",
    "encode": "encode images or clips into an autoencoder's latents, once",
    "recipes": "list the training recipes in the package, for elit train --config recipe:NAME",
    "train": "train a model on digits or a folder of images",
    "import": "convert a published checkpoint into a saved model",
    "distill": "give a pretrained pipeline or model a dial: train it to work on fewer tokens",
    "sample": "make images with a trained model at any budget",
    "evaluate": "score a model's samples, or any pictures: FID, FDD, IS, KID, precision, recall, FVD, accuracy",
    "sweep": "score a model over budgets, steps and guidances: table, Pareto front, plots, report, model card",
    "serve": "serve images over OpenAI's API with a budget that follows the load",
    "loadtest": "send requests to a service at a given rate, and report latencies and refusals",
    "profile": "measure a model's speed on this machine, to plan sampling for a target time",
    "inspect": "look inside a model: Read's attention beside the loss, and pictures at every budget",
    "flops": "print a model's cost at each budget",
    "play": "open the playground: a page to try budgets, compare and plan",
    "doctor": "check this installation: versions, devices, speed, known problems",
}
FIRST = ("quickstart", "sample", "train", "distill", "serve")  # what a newcomer needs
SAME = {"--lr": "--learning-rate", "--epochs": "--steps", "--model": "--model.name", "--bs": "--batch-size"}
SAME |= dict.fromkeys(("--cfg-scale", "--guidance-scale"), "--scale") | {"--num-inference-steps": "--steps"}
"""Options as other programs call them."""

# Errors of the system that mean that a path is bad input.
BAD_PLACE = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG}


@dataclass(frozen=True, kw_only=True)
class Command:
    """Options of every command."""

    json: bool = False  # Print the result as JSON last on stdout.


@dataclass(frozen=True, kw_only=True)
class Output(Command):
    """Options of commands that write what may be there already."""

    overwrite: bool = False  # Replace what is there, when the new files are complete.


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 1 for a failed run, 2 for bad input, 130 for an interrupted one."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if sys.stdout is None:  # closed by the parent process
        sys.stdout = io.StringIO()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"  # without a place in the code
    try:
        try:
            return _run(arguments)
        finally:
            print(end="", flush=True)
    except OSError as error:  # of stdout; silent where its reader has gone, as `head` does
        # Python would try once more at its end, and print the error.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1 if isinstance(error, BrokenPipeError) else _fail(f"elit: stdout: {error.strerror}", 1)


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        shown = COMMANDS if arguments else FIRST
        print("usage: elit COMMAND [options]", "", "Diffusion transformers with a compute dial.", "", sep="\n")
        print(*(f"  {name:{max(map(len, shown))}}  {COMMANDS[name]}" for name in shown), sep="\n")
        if not arguments:
            print(f"\nMore (elit --help): {', '.join(name for name in COMMANDS if name not in FIRST)}")
        print("\nEvery command has --help, and --json for machine-readable results last on stdout.")
        print("Example: elit quickstart")
        return 0
    name, *words = arguments
    if name == "--tyro-print-completion" and words in (["bash"], ["zsh"]):  # of all commands at once
        from tyro.extras import subcommand_cli_from_dict

        subcommand_cli_from_dict({each: _module(each).Args for each in COMMANDS}, prog="elit", args=arguments)
    if name == "--version":
        print(f"elit {__version__}")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name.lower().replace("_", "-"), COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return _fail(f"elit: unknown command {name!r}; {hint}commands: {', '.join(COMMANDS)}", 2)
    try:
        command = _module(name)
        args = command.parse(words) if hasattr(command, "parse") else parse(command.Args, name, words)
        result = command.run(args)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, FloatingPointError) as error:
        bad_input = isinstance(error, ValueError) or getattr(error, "errno", None) in BAD_PLACE
        return _fail(f"elit {name}: {' '.join(str(error).split())}", 2 if bad_input else 1)
    except KeyboardInterrupt:
        return _fail(f"elit {name}: stopped", 130)
    if args.json and result is not None:  # of several processes, only the main one has a result
        print(json.dumps(result))
    return 0


def _module(name: str) -> Any:
    return import_module(f"elit.cli.{name}{'_' * keyword.iskeyword(name)}")


def parse(kind: Any, name: str, arguments: Sequence[str], **options: Any) -> Any:
    """The dataclass `kind` filled from `arguments`. Raises ValueError with one line in the place of tyro's box."""
    import tyro

    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            args = tyro.cli(kind, prog=f"elit {name}", args=list(arguments), **options)
    except SystemExit as stop:
        if stop.code != 2:
            raise
        message = _one_line(output.getvalue())
        if wrong := re.match(r"Unrecognized options: (--[\w.-]+)", message):
            message += _meant(wrong[1].replace("_", "-"), kind, **options)
        raise ValueError(f"{message} (see elit {name} --help)") from None
    for field, value in vars(args).items():
        for number in value if isinstance(value, tuple) else (value,):
            require(not isinstance(number, float) or math.isfinite(number), field, number, "finite")
    named = {field: value for field, value in vars(args).items() if field in ("model", "pictures") and value}
    return replace(args, **{field: model_folder(value) for field, value in named.items()})  # perhaps in the package


def _meant(given: str, kind: Any, **options: Any) -> str:
    """The option that is close to one that does not exist, as a question; empty where none is."""
    import tyro

    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        tyro.cli(kind, args=["--help"], **options)
    known = sorted({*re.findall(r"--[a-z][\w.-]*\w", output.getvalue())} - {"--help"})
    close = [each for each in known if each == SAME.get(given) or each.endswith(f".{given[2:]}")]
    close += difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _one_line(box: str) -> str:
    """The message in tyro's box, without frame, title and advice; in ASCII, it has a rule below its title."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip(" │") for line in box.splitlines()]
    body = lines[1 if "╭" in box else 2 :]
    message = " ".join(itertools.takewhile(lambda line: set(line) - set("─-"), body))
    return re.sub(r"^Error parsing (?!--)\S+: ", "", " ".join(message.split()))


def option_value(arguments: Sequence[str], option: str) -> str | None:
    """The value of an option on which the defaults of the others depend, before they are parsed."""
    given = [following for each, following in itertools.pairwise(arguments) if each == option]
    given += [each.removeprefix(f"{option}=") for each in arguments if each.startswith(f"{option}=")]
    return given[-1] if given else None


def check_device(name: str | None) -> str:
    """The device as given, or the best one of this machine. Raises ValueError for a device that is not usable."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # a meta tensor has no value
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be usable on this machine, got {name!r} ({reason}); see elit doctor") from None
    return name


def free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0. Raises ValueError where nothing can listen there."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family) as probe:
            return int(probe.getsockname()[1])
    except (OSError, TypeError, ValueError, OverflowError) as error:  # the others for hosts and ports that do not exist
        raise ValueError(f"cannot listen at host={host!r}, port={port}: {error}; give others") from None


@contextlib.contextmanager
def show_progress(title: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """Gives a function (done, total) that moves a bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(escape(title), total=total)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code
