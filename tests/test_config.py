"""Settings, budgets, and files that are there whole or not at all."""

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from elit.budgets import (
    draw_budget,
    equal_parts,
    evenly_spaced,
    format_budget,
    parse_budget,
    resolve_budget,
    schedule_budgets,
    training_budgets,
)
from elit.config import ModelConfig, TrainConfig, load_config, save_config
from elit.files import check_writable, read_lines, replacing, whole_folder, write_folder, write_text


def test_round_trip(tmp_path):
    model = ModelConfig(name="DiT-B/2", window=(4, 4), split=(1, 2, 1))
    config = TrainConfig(steps=5, learning_rate=2e-3, budget_min=2, trackers=("tensorboard", "wandb"), model=model)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_yaml_as_written_by_hand(tmp_path):
    write_text(tmp_path / "c.yaml", "steps: 7\nlearning_rate: 1e-3\nmodel:\n  name: DiT-S/1\n  window: [2, 2]\n")
    config = load_config(tmp_path / "c.yaml")
    assert (config.steps, config.learning_rate, config.model.window) == (7, 1e-3, (2, 2))
    write_text(tmp_path / "c.yaml", "")
    assert load_config(tmp_path / "c.yaml") == TrainConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 7", "unknown field 'stepz'"),
        ("model: {nam: x}", "model: unknown field 'nam'"),
        ("steps: true", "steps must be int, got True"),
        ("learning_rate: fast", "learning_rate must be float, got 'fast'"),
        ("steps: 0", "steps must be at least 1, got 0"),
        ("seed: 9223372036854775808", "seed must be at most 9223372036854775807, got 9223372036854775808"),
        *((f"{name}: -0.1", f"{name} must be") for name in ("learning_rate", "class_dropout", "time_shift")),
        *((f"{name}: -1", f"{name} must be") for name in ("batch_size", "warmup_steps", "image_size")),
        ("{batch_size: 10, gradient_accumulation: 4}", "batch_size must be a multiple of gradient_accumulation=4, got"),
        ("\x89PNG\0", "not YAML"),
        ("steps: 1\nseed: 0\nsteps: 2", "'steps' is there twice"),
        ("precision: fp8", "precision must be .*'fp32', 'bf16'., got 'fp8'"),
        ("model: {window: 4}", "model: window must be tuple.int, .* None, got 4"),
        ("trackers: [wandbb]", "trackers must be any of tensorboard, wandb, trackio, got 'wandbb'"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    write_text(tmp_path / "c.yaml", text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(ValueError, match="no such file"):
        load_config(tmp_path / "missing.yaml")


SIXTEEN = tuple(range(1, 17))
FOURS = tuple(range(4, 17, 4))


@pytest.mark.parametrize(
    ("budget", "budgets", "expected"),
    [
        *((budget, SIXTEEN, 16) for budget in (None, 1.0, "1.0", "full")),
        *((budget, SIXTEEN, 8) for budget in (0.5, "0.5", "50%", np.int64(8))),
        *((budget, SIXTEEN, 1) for budget in (1, "1")),
        (0.28125, SIXTEEN, 5),  # 4.5 rounds up
        (np.float32(0.25), SIXTEEN, 4),
        (" 12.5 % ", SIXTEEN, 2),
        *((budget, FOURS, latents) for budget, latents in ((0.05, 4), (0.7, 12))),
        (None, (), None),
    ],
)
def test_valid_budgets(budget, budgets, expected):
    assert resolve_budget(budget, budgets) == expected


@pytest.mark.parametrize(
    ("budget", "budgets", "says"),
    [
        *((budget, SIXTEEN, "budget must be") for budget in (0, 17, -1, 0.0, 1.5, -0.5, float("nan"))),
        *((text, SIXTEEN, "budget must be") for text in ("x", "", "17", "1.5", "0%", "150%", "%", "8%%")),
        (6, FOURS, "4 to 16 in steps of 4"),
        *((budget, (), "no latent interface") for budget in (1.0, 4, "0.5")),
    ],
)
def test_an_invalid_budget_is_named(budget, budgets, says):
    with pytest.raises(ValueError, match=says):
        resolve_budget(budget, budgets)


@pytest.mark.parametrize("budget", [1, 8, 1.0, 0.5, 0.333, 1 / 16, None])
def test_what_is_formatted_parses_to_the_same(budget):
    parsed = parse_budget(format_budget(budget))
    assert type(parsed) is type(budget) or budget is None
    assert resolve_budget(parsed, SIXTEEN) == resolve_budget(budget, SIXTEEN)


def test_draws_are_uniform_and_depend_on_seed_and_step():
    draws = [draw_budget(0, step, SIXTEEN) for step in range(16_000)]
    assert draws == [draw_budget(0, step, SIXTEEN) for step in range(16_000)]
    assert draws[:50] != [draw_budget(1, step, SIXTEEN) for step in range(50)]
    counts = Counter(draws)
    assert set(counts) == set(SIXTEEN)
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 38  # chi², 15 degrees of freedom, p = 0.001


def test_training_budgets_are_a_range_of_the_valid_ones():
    assert training_budgets(SIXTEEN, None, None) == SIXTEEN
    assert training_budgets(tuple(range(1, 65)), 4, None) == tuple(range(4, 65))
    assert training_budgets(SIXTEEN, 16, 16) == (16,)
    assert training_budgets((), None, None) == ()
    for low, high in ((0, 4), (5, 4), (1, 17)):
        with pytest.raises(ValueError, match=f"got {low} and {high}"):
            training_budgets(SIXTEEN, low, high)
    with pytest.raises(ValueError, match="no budget of this model lies between"):
        training_budgets(FOURS, 5, 7)
    with pytest.raises(ValueError, match="no latent interface"):
        training_budgets((), 1, None)


TIMES = [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (None, [16] * 4),
        ("0.5", [8] * 4),
        ([1, 0.5, None, 16], [1, 8, 16, 16]),
        (lambda t: 4 if t < 0.5 else 1.0, [4, 4, 16, 16]),
        ("50%@0-0.5,100%@0.5-1", [8, 8, 16, 16]),
        ("0.5@0-0.5,1.0@0.5-1", [8, 8, 16, 16]),
        ("50%@0-0.5,1@0.5-1", [8, 8, 1, 1]),  # a bare 1 is one latent, everywhere
        ("4@0-0.6,full@0.6-1", [4, 4, 4, 16]),
    ],
)
def test_schedules(schedule, expected):
    assert schedule_budgets(schedule, TIMES, SIXTEEN) == expected


def test_boundaries_belong_to_the_later_piece_and_parts_are_the_fewest():
    assert schedule_budgets("1@0-0.3,16@0.3-1", [0.2, 3 * 0.1], SIXTEEN) == [1, 16]
    assert [equal_parts(each) for each in ([16, 16, 1, 1], [4] * 6)] == [[16, 1], [4]]
    assert [evenly_spaced(SIXTEEN, count) for count in (4, 20, 1)] == [[1, 6, 11, 16], [*SIXTEEN], [1]]
    assert [equal_parts(each) for each in ([4, 1, 1, 4], [2] * 4 + [1] * 2)] == [[4, 1, 1, 4], [2, 2, 1]]


@pytest.mark.parametrize(
    "schedule",
    ["0.5@0-0.4,1.0@0.5-1", "0.5@0-0.5", "0.5@0.5-1,1@0-0.5", "0.5@0-1.5", "x@0-1", "0.5@0", "20@0-1", [8, 8]],
)
def test_a_bad_schedule_is_named(schedule):
    with pytest.raises(ValueError, match="budget"):
        schedule_budgets(schedule, TIMES, SIXTEEN)


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
    (tmp_path / "a.txt").write_bytes("a\u2028b\r\n\nc\x85d\x0ce\n\n".encode(encoding))
    assert read_lines(tmp_path / "a.txt") == ["a\u2028b", "c\x85d\x0ce"]
    (tmp_path / "a.txt").write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match=r"cannot read '.*a\.txt': must be UTF-8"):
        read_lines(tmp_path / "a.txt")
