"""A sweep: the front and ρ on tables made by hand, what is left out, what is found again, and the table."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scored import save_dino, save_noise, small_network

import elit
from elit import Sampling
from elit.evaluate.chunks import Work, recipe_digest
from elit.evaluate.detectors import open_detector
from elit.evaluate.metrics import saturation
from elit.evaluate.reference import open_reference
from elit.evaluate.samples import Sampler
from elit.evaluate.score import MetricGroup, score
from elit.evaluate.sweep import (
    Point,
    best,
    degradations,
    front_of,
    make_settings,
    pareto_front,
    part_ends,
    read_table,
    sweep,
    write_table,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("digit_classifiers")]


SCALES = (1.0, 2.0, 3.0)


def point(budget: str = "8", **values) -> Point:
    base = {"share": int(budget) / 16, "steps": 4, "guidance": "none", "scale": 1.0, "guidance_budget": None}
    base |= {"count": 10, "gflops": 1.0, "ms": 1.0, "saturation": 0.5, "detector": "digits"}
    base |= {"recipe_sha256": "0" * 64, "file": "scores/0.json", "scores": {"fd": 10.0, "accuracy": 0.5}}
    return Point(budget=budget, **base | values)


def test_the_front_is_what_the_definition_says():
    """Against all pairs, on a coarse grid, so with many ties; equal points all stay, in their order."""
    numbers = np.random.default_rng(0).integers(0, 6, (200, 60, 2)).astype(float)
    for table in numbers:
        beaten = [any((p <= q).all() and (p < q).any() for p in table) for q in table]
        front = pareto_front(*table.T)
        assert sorted(front) == [i for i, is_beaten in enumerate(beaten) if not is_beaten]
        assert [table[i][0] for i in front] == sorted(table[i][0] for i in front)
    assert pareto_front([1.0, 1.0, 1.0], [2.0, 2.0, 2.0]) == [0, 1, 2]


def test_the_front_goes_the_right_way_for_each_metric():
    cheap = point(gflops=1.0, ms=9.0, scores={"fd": 20.0, "accuracy": 0.9})
    dear = point(gflops=2.0, ms=3.0, scores={"fd": 10.0, "accuracy": 0.8})
    assert front_of([dear, cheap], "fd", "gflops") == [cheap, dear]
    assert front_of([dear, cheap], "accuracy", "gflops") == [cheap]
    assert front_of([dear, cheap], "fd", "ms") == [dear]
    assert best([dear, cheap], "fd") is dear
    assert best([dear, cheap], "accuracy") is cheap


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
