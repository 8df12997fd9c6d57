"""Draws of arguments for public functions and options of commands: most are wrong, some are right, none may surprise.

The outcome of a draw is a result, a ValueError or TypeError of one line, or for a command exit code 2 with one line on
stderr; a draw that is refused leaves no file. `python tests/fuzz.py --draws 20000` draws more than the suite does.
"""

import argparse
import contextlib
import dataclasses
import io
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import elit
from elit.cli.main import COMMANDS, main
from elit.models.saved import save_model

SIZES = {"sample_size": 8, "in_channels": 1, "num_classes": 4, "hidden_size": 8, "num_heads": 1, "depth": 3}

# Whole runs of these take seconds, so that their options alone are drawn.
PARSED_ONLY = set(COMMANDS) - {"sample", "flops", "recipes", "import"}


def tiny(name: str = "ELIT-DiT-S/1", **changes: Any) -> Any:
    torch.manual_seed(0)
    interface = {"split": (1, 1, 1), "window": (4, 4)} if name.startswith("ELIT") else {}
    return elit.create_model(name, **SIZES | interface | changes).eval()


# Drawn for every argument.
ANYTHING = st.sampled_from(
    [
        *(None, True, False, 0, 1, 2, 3, 4, -1, 17, 64, 0.0, 0.5, 1.0, 1.5, 2.5, -0.5, math.inf, -math.inf, math.nan),
        *(
            "",
            "x",
            "4",
            "50%",
            "0%",
            "150%",
            "100%@0-0.5,50%@0.5-1",
            "0.5@0-0.5",
            "@",
            "full",
            "none",
            "cfg",
            "nan",
            "8",
        ),
        *("a\nb", "é", "\x00", "x" * 300, "-1", "1e400", "bfloat16", "euler", "heun", "digits"),
        *((), (1,), (4, 4), (1, 1, 1), [], [1], [1, 2, 3], [16, 4], ["x"], [None], [math.nan], {}, {"a": 1}, {1}),
        *(b"x", 1j, object(), int, len, np.int64(2), np.float32(0.5), np.array([1, 2]), np.array(3)),
        *(torch.tensor(2), torch.tensor([1, 2]), torch.tensor(0.5), torch.zeros(0), torch.zeros(2, 1, 8, 8)),
        *(torch.float32, torch.bfloat16, torch.int64, torch.Generator(), Path("nowhere"), Path(), range(2)),
    ]
)
BIG = st.sampled_from([1 << 63, 1 << 64, 10**30, -(10**30)])
TEXT = st.one_of(
    st.sampled_from(
        [
            *(
                "",
                "x",
                "-1",
                "0",
                "1",
                "2",
                "3",
                "8",
                "16",
                "17",
                "1.5",
                "0.5",
                "50%",
                "0%",
                "150%",
                "100%@0-0.5,8@0.5-1",
            ),
            *(
                "nan",
                "inf",
                "-inf",
                "1e400",
                "none",
                "full",
                "cfg",
                "ccfg",
                "ag",
                "euler",
                "heun",
                "float32",
                "bfloat16",
            ),
            *(
                "digits",
                "nowhere",
                "a/b/c",
                "..",
                "/",
                "a\nb",
                "é",
                "x" * 300,
                "cpu",
                "cuda:99",
                "meta",
                "True",
                "None",
            ),
            *("recipe:x", "ELIT-DiT-S/1", "x.png", "x.npz", "x.json", "{}", "[]", "1,2", "🙂", "'", '"', "$HOME", "*"),
        ]
    ),
    st.text(max_size=6),
)


class Place:
    """A folder to draw in, with a saved network; and the networks that functions are called with."""

    def __init__(self, folder: Path):
        self.model, self.plain = tiny(), tiny("DiT-S/1")
        self.saved = folder / "saved"
        save_model(self.model, self.saved)
        self.work = folder / "work"
        self.work.mkdir()
        self.inputs = {"x": torch.zeros(2, 1, 8, 8), "t": torch.zeros(2), "y": torch.tensor([0, 1])}


def functions(place: Place) -> dict[str, tuple[Callable[..., Any], dict[str, Any], tuple[str, ...]]]:
    """Every public function: how it is called, arguments that are right, and the names of those to be drawn."""
    guides = ("scale", "budget", "interval")
    return {
        "sample": (
            lambda **given: elit.sample(**given),
            {"model": place.model, "y": [0, 1], "steps": 1},
            (
                *("model", "y", "steps", "budget", "step_budgets", "sample_budgets", "guidance", "solver", "seed"),
                *("shift", "sample_size", "noise", "batch_size", "progress", "cache", "dtype"),
            ),
        ),
        "forward": (place.model, dict(place.inputs), ("x", "t", "y", "budget", "branch_budgets", "shared")),
        "plain forward": (place.plain, dict(place.inputs), ("x", "t", "y", "budget")),
        "CFG": (elit.CFG, {"scale": 1.5}, ("scale", "interval")),
        "AG": (elit.AG, {"scale": 1.5, "budget": 1}, guides),
        "CCFG": (elit.CCFG, {"scale": 1.5, "budget": 1}, guides),
        "create_model": (
            elit.create_model,
            {"name": "ELIT-DiT-S/1", **SIZES, "split": (1, 1, 1), "window": (4, 4)},
            ("name", *SIZES, "split", "window", "num_latents", "patch_size", "mlp_ratio", "unknown"),
        ),
        "count_flops": (elit.count_flops, {"model_or_name": place.model}, ("model_or_name", "sample_size", "budget")),
        "elastify": (
            lambda **given: elit.elastify(tiny("DiT-S/1"), **given),
            {"read_after": 1, "write_after": 2, "window": (4, 4)},
            ("read_after", "write_after", "window", "mode", "seed"),
        ),
        "budget": (lambda **given: elit.budget(**given).__enter__(), {"value": 1}, ("value",)),
        "plan": (
            elit.plan,
            {"model": place.model, "target_gflops": 1.0},
            ("target_gflops", "target_ms", "target_images_per_s", "batch", "guidance", "cache", "dtype", "quality"),
        ),
        "load_model": (elit.load_model, {"folder": place.saved}, ("folder", "torch_dtype")),
        "load_elastic": (elit.load_elastic, {"pipe_or_folder": place.saved}, ("pipe_or_folder", "name")),
        "load_released": (
            elit.load_released,
            {"path": place.saved / "config.json"},
            ("path", "kind", "num_heads", "tail_blocks"),
        ),
    }


def call(place: Place, draw: Any) -> None:
    """One draw of a function."""
    name = draw(st.sampled_from(sorted(functions(place))))
    function, right, names = functions(place)[name]
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    bounded = ("steps", "sample_size", "batch")  # of which large ones are valid, and take long
    given = {each: draw(ANYTHING if each in bounded else st.one_of(ANYTHING, BIG)) for each in chosen}
    said = ""
    try:
        function(**right | given)
    except (ValueError, TypeError) as error:
        said = str(error)
    except Exception as error:
        raise AssertionError(f"{name} with {given}: {type(error).__name__}: {error}") from error
    finally:
        from elit.budgets import budget_block

        budget_block.set(None)
    assert "\n" not in said, f"{name} with {given}: more than a line"
    left = [path.name for path in place.work.iterdir()]
    assert not left, f"{name} with {given}: left {left}"


def options(name: str) -> list[tuple[str, Any]]:
    """The options of a command and their kinds, as its dataclass has them."""
    module = import_module(f"elit.cli.{'import_' if name == 'import' else name.replace('-', '_')}")
    return [(each.name, each.type) for each in dataclasses.fields(module.Args)]


def run(place: Place, draw: Any) -> None:
    """One draw of a command."""
    name = draw(st.sampled_from(sorted(COMMANDS)))
    first = {"sample": [str(place.saved)], "flops": ["ELIT-DiT-S/2"]}.get(name, [])
    line = [name, *draw(st.one_of(st.just(first), st.lists(TEXT, max_size=2)))]
    for option, kind in draw(st.lists(st.sampled_from(options(name)), max_size=3, unique_by=lambda each: each[0])):
        line.append(f"--{option.replace('_', '-')}")
        line += draw(st.lists(TEXT, max_size=3)) if "tuple" in str(kind) else [draw(TEXT)]
    if name == "sample" and "--steps" not in line:
        line += ["--steps", "1"]
    if "--json" not in line and draw(st.booleans()):
        line.append("--json")
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = outcome(name, line)
    said = error.getvalue()
    assert code in (0, 1, 2), f"{line}: exit code {code}"
    if code:
        assert said.count("\n") == 1, f"{line}: said {said!r}"
        assert out.getvalue() == "", f"{line}: printed {out.getvalue()!r}"
        left = [str(path) for path in place.work.rglob("*")]
        assert not left, f"{line}: left {left}"
    for path in sorted(place.work.rglob("*"), reverse=True):  # what a right line has written
        path.rmdir() if path.is_dir() else path.unlink()


def outcome(name: str, line: list[str]) -> int | str | None:
    """A command's exit code; of one whose run takes long, that of its arguments alone."""
    try:
        if name not in PARSED_ONLY:
            return main(line)
        module = import_module(f"elit.cli.{'import_' if name == 'import' else name.replace('-', '_')}")
        try:
            module.parse(line[1:])
        except ValueError as error:
            print(f"elit {name}: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except OSError as error:  # as `main` says it, on one line
            print(f"elit {name}: {error}", file=sys.stderr)
            return 2
        return 0
    except SystemExit as stop:  # --help
        return stop.code
    except Exception as error:
        raise AssertionError(f"{line}: {type(error).__name__}: {error}") from error


def fuzz(draws: int, folder: Path, *, repeatable: bool = True) -> None:
    """Draws so many functions and commands, half of each. Raises AssertionError with the shortest draw that fails."""
    place, before = Place(folder), Path.cwd()
    how = settings(
        max_examples=draws // 2,
        deadline=None,
        database=None,
        derandomize=repeatable,
        suppress_health_check=list(HealthCheck),
    )
    os.chdir(place.work)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            how(given(st.data())(lambda data: call(place, data.draw)))()
            how(given(st.data())(lambda data: run(place, data.draw)))()
    finally:
        os.chdir(before)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=20_000)
    count = parser.parse_args().draws
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        fuzz(count, Path(temporary), repeatable=False)
    print(f"{count:,} draws, none of them a surprise")
