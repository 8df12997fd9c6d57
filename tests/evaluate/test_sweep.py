"""A sweep: front and ρ of tables made by hand, the command as a user types it, the page and the card."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fresh, links_of
from huggingface_hub import ModelCard
from PIL import Image
from scored import save_dino, save_noise, small_network

import elit
from elit import Sampling
from elit.cli.main import main
from elit.evaluate.chunks import Work, recipe_digest
from elit.evaluate.detectors import open_detector
from elit.evaluate.metrics import saturation
from elit.evaluate.plots import at_best_scale, budgets_of
from elit.evaluate.reference import open_reference
from elit.evaluate.report import MARK, card_points, command, pipeline_tag, write_card, write_sweep_report
from elit.evaluate.samples import Sampler
from elit.evaluate.score import MetricGroup, score
from elit.evaluate.sweep import (
    Point,
    best,
    degradations,
    make_settings,
    pareto_front,
    part_ends,
    read_table,
    sweep,
    write_table,
)
from elit.models.saved import save_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("digit_classifiers")]

SCALES = (1.0, 2.0, 3.0)


def point(budget: str = "8", **values) -> Point:
    base = {"share": int(budget) / 16, "steps": 4, "guidance": "none", "scale": 1.0, "guidance_budget": None}
    base |= {"count": 10, "gflops": 1.0, "ms": 1.0, "saturation": 0.5, "detector": "digits"}
    base |= {"recipe_sha256": "0" * 64, "file": "scores/0.json", "scores": {"fd": 10.0, "accuracy": 0.5}}
    return Point(budget=budget, **base | values)


def test_the_front_is_what_the_definition_says():
    numbers = np.random.default_rng(0).integers(0, 6, (200, 60, 2)).astype(float)
    for table in numbers:
        beaten = [any((p <= q).all() and (p < q).any() for p in table) for q in table]
        front = pareto_front(*table.T)
        assert sorted(front) == [i for i, is_beaten in enumerate(beaten) if not is_beaten]
        assert [table[i][0] for i in front] == sorted(table[i][0] for i in front)
    assert pareto_front([1.0, 1.0, 1.0], [2.0, 2.0, 2.0]) == [0, 1, 2]


def test_degradation():
    for metric, at_budget, at_full, rho in (
        *(("fid", 6.0, 4.0, 1.5), ("accuracy", 0.4, 0.8, 2.0)),
        *(("kid", -0.1, 0.2, None), ("accuracy", 0.0, 0.8, None)),
    ):
        two = [point("16", scores={metric: at_full}), point("8", scores={metric: at_budget})]
        assert [ratio for p, ratio in degradations(two, metric) if p.budget == "8"] == ([] if rho is None else [rho])
    full, half = point("16", scores={"fd": 4.0}), point("8", scores={"fd": 5.0})
    other = [replace(p, steps=8, scores={"fd": 2 * p.scores["fd"] ** 2}) for p in (full, half)]
    alone = replace(half, guidance="cfg", scale=2.0)  # its full budget was not swept
    found = degradations([full, half, *other, alone], "fd")
    assert found == [(full, 1.0), (half, 1.25), (other[0], 1.0), (other[1], 1.5625)]
    changes = {"guidance_low": 0.3, "guidance_high": 0.7, "solver": "heun", "shift": 2.0, "model_sha256": "1"}
    for name, value in changes.items():  # of a mixed table
        foreign = replace(full, **{name: value}, scores={"fd": 2.0})
        assert degradations([full, half, foreign], "fd") == [(full, 1.0), (half, 1.25), (foreign, 1.0)]


def test_saturation():
    colours = torch.tensor([[[200, 100]], [[100, 100]], [[50, 100]]], dtype=torch.uint8)  # HSV: 0.75, 0
    assert saturation(colours[None]).tolist() == [0.375]
    assert saturation(torch.zeros(1, 3, 2, 2, dtype=torch.uint8)).tolist() == [0.0]
    grey = torch.tensor([[[0, 255, 0, 255]], [[90, 90, 90, 90]]], dtype=torch.uint8)
    assert saturation(grey[:, None]).tolist() == [1.0, 0.0]
    assert saturation(grey[:, None, None]).tolist() == [1.0, 0.0]  # clips


@pytest.fixture(scope="module")
def network():
    return small_network()


def test_settings_are_all_combinations_less_what_is_none_or_twice(network, tmp_path):
    sampler = Sampler(network, Work(out=tmp_path, chunk=4))
    guidance = [None, *(kind for s in SCALES for kind in (elit.CFG(s), elit.AG(s, 2), elit.CCFG(s, 2)))]
    grid = {"budgets": (16, 0.5, 8, 1), "steps": (1, 2)}
    settings = make_settings(sampler, **grid, guidance=guidance)
    assert len(settings) == 2 * (2 * 7 + 5)  # 0.5 is 8, scale 1 is no guidance, AG at 1 would lower nothing
    assert len({recipe_digest(sampler.recipe(setting)) for setting in settings}) == len(settings)
    like, schedule = Sampling(shift=2.0, seed=7), "4@0-0.5,16@0.5-1"
    found = make_settings(sampler, budgets=(16, schedule), steps=(4,), caches=(0.0, 0.5), like=like)
    assert found == [replace(like, steps=4, budget=b, cache=cache) for b in (16, schedule) for cache in (0.0, 0.5)]
    with pytest.raises(ValueError, match="budget"):
        make_settings(sampler, **(grid | {"guidance": (elit.CCFG(2.0, 99),)}))


def groups(work: Work) -> list[MetricGroup]:
    save_dino(work.out / "dino")
    save_noise(work.out / "real.npz", 40, 8, 8)
    detector = open_detector(f"dinov2:{work.out / 'dino'}")
    reference = open_reference(work.out / "real.npz", detector, work)
    return [MetricGroup("dinov2", detector, reference, ("fdd", "precision"))]


def test_what_is_scored_already_is_not_done_again(network, tmp_path, monkeypatch):
    work = Work(out=tmp_path, chunk=8)
    sampler, wanted = Sampler(network, work), groups(work)
    evaluated = score(sampler.make(Sampling(steps=2, budget=4), 20), wanted[0], work)
    settings = make_settings(sampler, budgets=(16, 4), steps=(1, 2), guidance=(None, elit.CCFG(2.0, 1)))
    told: list[tuple[int, int]] = []
    points, known = sweep(sampler, settings, wanted, count=20, progress=lambda *now: told.append(now))
    assert (len(points), known) == (8, 1)
    assert told[-1] == (140, 140)
    assert part_ends(200, 32) == [32, 64, 128, 200]
    found = next(p for p in points if (p.budget, p.steps, p.guidance) == ("4", 2, "none"))
    assert (found.file, found.scores) == (f"scores/{evaluated.recipe_sha256[:32]}.json", evaluated.scores)
    assert found.gflops == pytest.approx(2 * elit.count_flops(network, budget=4) / 1e9)
    for each in points:  # from the table to everything that decides a number
        stored = json.loads((tmp_path / each.file).read_text())
        assert stored["recipe_sha256"] == each.recipe_sha256 == recipe_digest(stored["recipe"])
        assert str(stored["recipe"]["samples"]["budget"]) == each.budget
        assert (stored["scores"], stored["saturation"]) == (each.scores, each.saturation)
    assert len(list((tmp_path / "scores").iterdir())) == 8

    monkeypatch.setattr(Sampler, "_chunk", None)  # nothing is sampled again
    assert sweep(sampler, settings, wanted, count=20) == (points, 8)

    broken = tmp_path / points[3].file
    broken.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        sweep(sampler, settings, wanted, count=20)
    broken.unlink()  # its samples are there; only the score is made anew
    monkeypatch.setattr(Sampler, "warm_up", lambda self: None)
    assert sweep(sampler, settings, wanted, count=20) == (points, 7)


def test_tables_of_json_lines_and_older_ones_of_parquet(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    points = [point(), point("16", guidance="ag", scale=2.0, guidance_budget=1, scores={"fid": 3.0})]
    write_table(points, tmp_path / "a.jsonl")
    columns = dict.fromkeys(name for each in points for name in each.row())
    rows = [columns | each.row() for each in points]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_table(tmp_path / "a.jsonl") == read_table(tmp_path / "a.parquet") == points
    assert points[1].sampling == Sampling(steps=4, budget=16, guidance=elit.AG(2.0, 1))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
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


COST = {"none": 1.0, "cfg": 2.0, "ag": 1.6, "ccfg": 1.5}
PICTURES = ("compute_quality", "guidance", "degradation", "saturation")


def points(budgets=("16", "8", "2"), kinds=tuple(COST), steps=(4, 8)) -> list[Point]:
    made = []
    scaled = [(kind, scale) for kind in kinds for scale in ((1.0,) if kind == "none" else (1.5, 2.0, 3.0))]
    for budget, count, (kind, scale) in product(budgets, steps, scaled):
        share = {"all": 1.0, "2@0-0.5,16@0.5-1": 0.56}.get(budget) or int(budget) / 16
        cost, name, weak = share * count * COST[kind], f"{len(made):064x}", 1 if kind in ("ag", "ccfg") else None
        values = {"budget": budget, "share": share, "steps": count, "guidance": kind, "scale": scale}
        values |= {"guidance_budget": weak, "count": 100, "gflops": cost, "ms": 2 * cost, "detector": "digits"}
        values |= {"saturation": 0.3 + 0.1 * scale, "recipe_sha256": name, "file": f"scores/{name[-32:]}.json"}
        made.append(Point(**values, scores={"fd": 5 + 20 / cost + abs(scale - 2), "kid": 1.0, "kid_std": 0.1}))
    return made


def test_the_page(tmp_path):
    made = points(("16", "8", "2@0-0.5,16@0.5-1", "2"))
    page = write_sweep_report(tmp_path, made, "fd", model=Path("m"), grey=True)
    text = page.read_text(encoding="utf-8")
    for name in PICTURES:
        width, height = Image.open(tmp_path / f"{name}.png").size
        assert min(width, height) > 400
    assert all(link.startswith("data:image/png;base64,") for link in links_of(text))
    assert len(links_of(text)) == len(PICTURES)
    assert all(point.file in text for point in made)  # every point can be traced
    assert budgets_of(made) == ["16", "2@0-0.5,16@0.5-1", "8", "2"]
    assert {point.scale for point in at_best_scale(made, "fd", "cfg")} == {2.0}
    ccfg = next(point for point in made if point.guidance == "ccfg" and point.budget == "2")
    assert command(ccfg, Path("m")).endswith("--steps 4 --budget 2 --guidance ccfg --scale 1.5 --guidance-budget 1")
    changed = replace(ccfg, cache=0.5, solver="heun", shift=2.0, guidance_low=0.25)
    more = "--guidance-interval 0.25 1 --guidance-budget 1 --solver heun --shift 2.0 --cache 0.5"
    assert command(changed, Path("m")).endswith(f"--scale 1.5 {more}")
    top = best(made, "fd")
    assert f"Best fd: {top.scores['fd']:.4g} with 8 steps, budget 16, cfg 2" in text
    assert "elit sample m --steps 8 --budget 16 --guidance cfg --scale 2</p>" in text


def test_the_card_is_read_by_the_hubs_own_parser(tmp_path):
    model, made = fresh("elit-dit"), points()
    options = {"reference": "digits", "license": "mit", "datasets": ["a/b"], "instead": tmp_path / "out/README.md"}
    path = write_card(tmp_path, model, made, "fd", **options)
    assert path == tmp_path / "README.md"
    card = ModelCard.load(path)
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "elit", "unconditional-image-generation")
    assert (data.model_name, data.datasets, data.metrics) == ("ELIT-DiT", ["a/b"], ["fd", "kid"])
    rows = card_points(made, "fd")
    assert len(rows) == 2 * 3 * 4
    rated = rows[:12]  # with the most steps
    read = {(result.metric_type, result.metric_name): result for result in data.eval_results}
    assert len(read) == len(data.eval_results) == len(rated) + 1  # the other metric, of the best row alone
    for row in rated:
        result = read["fd", f"fd ({row.sampling.describe()}, {row.gflops:.4g} GFLOPs)"]
        assert result.metric_value == round(row.scores["fd"], 6)
        assert (result.dataset_name, result.task_type) == ("digits", "unconditional-image-generation")
    lines = [line for line in card.text.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + len(rows)

    text = path.read_text(encoding="utf-8")
    assert write_card(tmp_path, model, made, "fd", **options) == path  # its own card is written anew
    path.write_text(text.replace(MARK, "My own words."), encoding="utf-8")
    assert write_card(tmp_path, model, made, "fd", **options) == tmp_path / "out/README.md"
    assert "My own words." in path.read_text(encoding="utf-8")
    tags = {kind: pipeline_tag(fresh(kind)) for kind in ("dit", "elit-mmdit", "dit-video")}
    assert tags == {"dit": "unconditional-image-generation", "elit-mmdit": "text-to-image", "dit-video": None}
