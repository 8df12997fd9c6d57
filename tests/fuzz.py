"""Draws of arguments for public functions and options of commands: most are wrong, some are right, none may surprise.

The outcome of a draw is a result, a ValueError or TypeError of one line, or for a command exit code 2 with one line on
stderr; a draw that is refused leaves no file. `python tests/fuzz.py --draws 20000` draws more than the suite does.
What is drawn is in `fuzzing/`.
"""

import argparse
import contextlib
import io
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from fuzzing import commands, functions
from fuzzing.place import Place, quick
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SHARES = {"functions": 7, "commands": 3}


def fuzz(draws: int, folder: Path, *, repeatable: bool = True, parts: str = "functions commands") -> None:
    """Draws so many, seven functions to three commands, which take longer.

    Raises AssertionError with the shortest draw that fails.
    """
    before = Path.cwd()
    how = settings(
        deadline=None,
        database=None,
        derandomize=repeatable,
        suppress_health_check=list(HealthCheck),
    )
    with warnings.catch_warnings(), quick():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            place = Place(folder)
        of_functions, of_commands = functions.functions(place), commands.command_lines(place)
        if "functions" in parts:
            functions.check_right(place, of_functions)
        drawn: dict[str, Callable[[Any], None]] = {
            "functions": lambda data: functions.call(place, of_functions, data.draw),
            "commands": lambda data: commands.run(place, data.draw(of_commands)),
        }
        os.chdir(place.work)
        try:
            for part in parts.split():
                of_part = settings(how, max_examples=draws * SHARES[part] // 10)
                of_part(given(st.data())(drawn[part]))()
        finally:
            os.chdir(before)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=20_000)
    parser.add_argument("--parts", default="functions commands", help="one of them, or both")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        fuzz(arguments.draws, Path(temporary), repeatable=False, parts=arguments.parts)
    print(f"{arguments.draws:,} draws, none of them a surprise")
