"""elit sweep as a user types it: one table, resumed, shared by two processes; and its mistakes."""

import json

import pytest
from commands import run_two
from scored import save_dino, save_noise, small_network

from elit.cli.main import main
from elit.models.saved import save_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("digit_classifiers")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a model of 8×8 grey images, its baseline, a small detector and real pictures."""
    folder = tmp_path_factory.mktemp("sweep")
    for name, saved in (("ELIT-DiT-S/1", "model"), ("DiT-S/1", "plain")):
        save_model(small_network(name), folder / saved)
    save_dino(folder / "dino")
    save_noise(folder / "real.npz", 40, 8, 8)
    return folder


@pytest.fixture(autouse=True)
def _there(workplace, monkeypatch):
    monkeypatch.chdir(workplace)


SCORED = ("--reference", "real.npz", "--detector", "dinov2:dino", "--count", "12", "--chunk", "4")
GRID = ("--budgets", "1.0", "0.25", "--schedules", "4@0-0.5,16@0.5-1", "--steps", "1", "2")
KINDS = ("--guidance", "none", "ag", "ccfg", "--scales", "1.5", "2")


def run(capsys, *arguments):
    code = main(["sweep", *map(str, arguments)])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_a_sweep_and_the_same_again(capsys, workplace):
    evaluated = ("--steps", "2", "--budget", "4", "--guidance", "ccfg", "--scale", "2", "--out", "out")
    assert main(["evaluate", "model", *SCORED, *evaluated]) == 0
    capsys.readouterr()
    line = ("model", *SCORED, *GRID, *KINDS, "--out", "out", "--json")
    code, said, _ = run(capsys, *line)
    assert code == 0
    result = json.loads(said.splitlines()[-1])
    # One step has one budget: the schedule is then its first piece, and so 4 latents, which are there already.
    assert (result["points"], result["known"]) == (2 * 5 * 2 + 5, 1)
    rows = [json.loads(row) for row in (workplace / "out/sweep.jsonl").read_text().splitlines()]
    assert len({row["recipe_sha256"] for row in rows}) == len(rows) == 25
    assert {row["budget"] for row in rows} == {"16", "4", "4@0-0.5,16@0.5-1"}
    assert result["card"] == "model/README.md"
    assert (workplace / "out/report.html").is_file()
    assert result["front"]["gflops"][-1]["fdd"] == min(row["fdd"] for row in rows)

    times = {path: path.stat().st_mtime_ns for path in (workplace / "out").glob("*/**/*.*") if path.is_file()}
    code, said, _ = run(capsys, *line[:-1], "--no-card")
    assert "Pareto front of 25 points, fdd against GFLOPs" in said
    assert "25 scores were there already." in said
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_two_processes_and_one_make_the_same_table(capsys, workplace, tmp_path):
    line = ["model", *SCORED, "--budgets", "1.0", "4", "--steps", "2", "--guidance", "none", "--no-card"]
    run_two(["sweep", *line, "--out", "two"], tmp_path)
    assert run(capsys, *line, "--out", "one")[0] == 0
    one, two = (
        [json.loads(row) | {"ms": None} for row in (workplace / out / "sweep.jsonl").read_text().splitlines()]
        for out in ("one", "two")
    )
    assert [row.pop("fdd") for row in one] == pytest.approx([row.pop("fdd") for row in two], rel=1e-9)
    assert one == two


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--schedules", "0.5@0-0.4"), "budget must cover t from 0 to 1"),
        (("--scales", "-1"), "scale"),
        (("--quality", "fid"), "quality must be any of fdd, got 'fid'"),
    ],
)
def test_mistakes_are_one_line(options, said, capsys):
    code, out, err = run(capsys, "model", *SCORED, "--out", "wrong", "--overwrite", *options)
    lines = [line for line in err.splitlines() if line and "Loading weights" not in line]  # transformers' own bar
    assert (code, out, len(lines)) == (2, "", 1), err
    assert lines[0].startswith("elit sweep: ")
    assert said in lines[0]


def test_a_baseline_has_no_budgets(capsys, workplace):
    line = ("plain", *SCORED, "--steps", "1", "2", "--out", "baseline", "--json")
    assert "guidance must be cfg for a model without a latent interface" in run(capsys, *line)[2]
    code, out, _ = run(capsys, *line, "--guidance", "none", "cfg")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["points"] == 4
    assert "no latent interface" in (workplace / "plain/README.md").read_text()
