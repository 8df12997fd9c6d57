"""Draws of command lines: a line that works, with options changed, doubled and left out."""

import contextlib
import dataclasses
import io
import json
import logging
import time
import warnings
from importlib import import_module
from typing import Any

from fuzzing.place import Place
from fuzzing.values import FEW, MANY
from hypothesis import strategies as st

from elit.cli.main import COMMANDS, main

SLOW = ("inspect", "sweep", "train", "profile", "play", "flops", "distill")
"""Take longest when their line is right, and are drawn less often."""
LONG = 20.0
"""Seconds of processor time, longer than any line here may take."""

# Of which a large number is right and takes long, or much memory; and so does None, where it is the default.
WORK = {
    *("steps", "count", "batch_size", "batch_sizes", "draws", "bins", "samples", "image_size", "frames", "chunk"),
    *("shard_size", "trajectories", "teacher_steps", "teacher_batch", "replicas", "seconds", "rate", "most", "workers"),
    *("hidden_size", "depth", "num_heads", "num_latents", "sample_size", "patch_size", "in_channels", "num_classes"),
    *("text_features", "text_length", "pooled_features", "window", "split", "sizes", "lora_rank", "preview_prompts"),
    *("max_batch", "most_steps", "least_steps", "max_replicas", "min_replicas", "tail_blocks", "gradient_accumulation"),
    *("times", "drain_seconds", "labels"),
}
SMALL = {
    **{name: {"--count": "4"} for name in ("evaluate", "sweep")},
    **{name: {"--steps": "1", "--batch-size": "2"} for name in ("train",)},
    "distill": {"--steps": "1", "--batch-size": "2", "--teacher-steps": "1"},
    "profile": {"--seconds": "0", "--batch-sizes": "1"},
    "loadtest": {"--seconds": "1", "--most": "2"},
    "inspect": {"--count": "2", "--draws": "1", "--steps": "1", "--times": "0.5"},
}
"""What stands in every line, since a default would take long."""
FIXTURES = [
    *("model", "plain", "text", "video", "elastic", "vae", "pipe", "stock", "pictures", "latents", "cut", "empty"),
    *("itself", "made.png", "plain.png", "prompts.txt", "trace.jsonl", "wrong.jsonl", "config.yaml", "wrong.yaml"),
    *("unknown.yaml", "wrong.json", "wrong.safetensors", "statistics.safetensors", "profile.json", "other.pt"),
    *("released.pt", "sweep/sweep.jsonl", "pictures/cats/0.png"),
]


def lines(place: Place) -> dict[str, list[list[str]]]:
    """Lines of every command that work; what they take is small."""
    p = place.__getitem__
    scored = ["--reference", p("statistics.safetensors"), "--detector", "digits", "--count", "4", "--steps", "1"]
    small = ["--steps", "1", "--batch-size", "2"]
    return {
        "quickstart": [[], ["--backbone", "video", "--steps", "1"]],
        "encode": [[p("pictures"), "encoded", "--vae", p("vae"), "--image-size", "8"], ["--inspect", p("latents")]],
        "recipes": [[]],
        "train": [
            ["--config", p("config.yaml"), "--out", "run", "--preview-every", "0"],
            ["--config", p("config.yaml"), "--data", p("pictures"), "--image-size", "8", "--out", "run"],
            ["--dry-run"],
        ],
        "import": [[p("released.pt"), "imported", "--num-heads", "2", "--tail-blocks", "1"]],
        "distill": [
            [p("stock"), "dial", "--prompts", p("prompts.txt"), *small, "--window", "2", "2", "--preview-every", "0"],
            [p("stock"), "dial", "--prompts", p("prompts.txt"), "--window", "2", "2", "--dry-run"],
        ],
        "sample": [
            [p("model"), "--steps", "1", "--labels", "3"],
            [p("text"), "--steps", "1", "--prompts", "a"],
            [p("video"), "--steps", "1", "--count", "1", "--out", "x.gif"],
            [p("pipe"), "--steps", "1", "--count", "2", "--out", "folder"],
            [p("model"), "--target-ms", "10000", "--count", "1"],
            ["--like", p("made.png")],
        ],
        "evaluate": [
            [p("model"), *scored],
            [p("pictures"), "--detector", "digits", "--reference", "digits"],
            [p("pictures"), "--detector", "digits", "--save-reference", "x.safetensors"],
        ],
        "sweep": [[p("model"), *scored, "--budgets", "1", "--guidance", "none", "--overwrite"]],
        "serve": [
            [p("model")],
            [p("model"), "--build", "x.yaml"],
        ],
        "loadtest": [
            ["http://127.0.0.1:9", "--trace", p("trace.jsonl")],
            ["http://127.0.0.1:9", "--write-trace", "x.jsonl", "--seconds", "2"],
        ],
        "profile": [[p("model"), "--seconds", "0", "--batch-sizes", "1"]],
        "inspect": [[p("model"), "--count", "2", "--draws", "1", "--steps", "1", "--times", "0.5"]],
        "flops": [[p("model")], [p("text"), p("plain")], ["--paper"]],
        "play": [[p("model"), "--port", "0"]],
        "doctor": [[]],
    }


def options(name: str) -> dict[str, Any]:
    """The options of a command and their kinds, as its dataclass has them; of a dataclass inside, its own."""
    module = import_module(f"elit.cli.{'import_' if name == 'import' else name.replace('-', '_')}")
    return _fields(module.Args)


def _fields(kind: Any, before: str = "") -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for each in dataclasses.fields(kind):
        inside = each.default_factory() if each.default_factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(inside):
            fields |= _fields(type(inside), f"{before}model." if each.name == "model" else before)
        else:
            fields[before + each.name] = each.type
    return fields


@st.composite
def command_lines(draw: Any, place: Place) -> list[str]:
    names = sorted(COMMANDS)
    name = draw(st.sampled_from([*names, *3 * [each for each in names if each not in SLOW]]))
    line = list(draw(st.sampled_from(lines(place)[name])))
    of_fixtures = st.sampled_from(FIXTURES).map(place.__getitem__)
    known = options(name)
    for option in draw(st.lists(st.sampled_from(sorted(known)), max_size=3)):
        short = option.rpartition(".")[2]
        # An option of the line works where another text does not: half of the draws keep to what may be right.
        text = st.one_of(FEW.filter(lambda word: word != "None") if short in WORK else MANY, of_fixtures)
        if known[option] is bool:
            line.append(f"--{draw(st.sampled_from(['', 'no-']))}{option.replace('_', '-')}")
        else:
            line.append(f"--{option.replace('_', '-')}")
            line += draw(st.lists(text, max_size=3)) if "tuple" in str(known[option]) else [draw(text)]
    if draw(st.integers(0, 3)) == 0 and line:
        i = draw(st.integers(0, len(line) - 1))
        word = line.pop(i)
        if draw(st.booleans()):
            line.insert(i, draw(of_fixtures if "/" in word else st.one_of(FEW, of_fixtures)))
    least = SMALL.get(name, {}) | ({"--config": place["config.yaml"]} if name == "train" else {})
    for option, value in least.items():
        if option not in line and ("--dry-run" not in line or "--no-dry-run" in line):
            line += [option, value]
    if name == "flops" and "--measure" in line:  # of the sizes that are the default it takes minutes
        line = [place["model"], *(word for word in line if "DiT" not in word)]
    if "--json" not in line and draw(st.booleans()):
        line.append("--json")
    return [name, *line]


def run(place: Place, line: list[str]) -> None:
    """A command in this process. Raises AssertionError where its outcome is none of those that it may have."""
    out, error = io.StringIO(), io.StringIO()
    start = time.process_time()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), logged(error):
            code = outcome(line)
        check(place, line, code, out.getvalue(), error.getvalue())
    finally:
        place.restore()
    seconds = time.process_time() - start
    assert seconds < LONG, f"{line}: took {seconds:.0f} s"


@contextlib.contextmanager
def logged(error: io.StringIO) -> Any:
    """What libraries warn of and log, which goes to the stderr that was there when they were imported."""
    handler = logging.StreamHandler(error)
    loggers = [logging.getLogger(name) for name in ("", "diffusers", "transformers", "accelerate")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
                warnings.simplefilter("ignore", kind)
            yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def outcome(line: list[str]) -> Any:
    """A command's exit code."""
    try:
        return main(line)
    except SystemExit as stop:  # --help
        return stop.code
    except BaseException as error:
        raise AssertionError(f"{line}: {type(error).__name__}: {error}") from error


def check(place: Place, line: list[str], code: Any, out: str, error: str) -> None:
    name = line[0]
    # A quickstart is stopped when it would train; 1 is of a run that fails, as one whose numbers overflow.
    codes = (0, 2, 130) if name == "quickstart" else (0, 1, 2) if "not finite" in error else (0, 2)
    assert code in codes, f"{line}: exit code {code}: {error}"
    said = [each for each in error.splitlines() if not each.startswith(f"elit {name}: note: ")]
    changed = place.changed()
    if code in (1, 130):  # it has told of its steps
        said = said[-1:]
    if code == 130:
        changed = [each for each in changed if (place.work / each).is_file()]
    if code:
        assert len(said) == 1, f"{line}: said {error!r}"
        assert said[0].startswith("elit "), f"{line}: said {error!r}"
        assert not out, f"{line}: printed {out!r}"
        assert not changed, f"{line}: left {changed}"
        return
    assert not [each for each in changed if each.endswith((".tmp", ".old"))], f"{line}: left {changed}"
    options = line[: line.index("--")] if "--" in line else line  # what follows is no option
    if "--json" in options and not {"--help", "--no-json"} & set(options) and out:
        json.loads(out.splitlines()[-1], parse_constant=lambda text: fail(f"{line}: {text} is no JSON"))


def fail(text: str) -> None:
    raise AssertionError(text)
