"""The page and the model card of a sweep, from points made by hand."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from conftest import fresh, links_of
from huggingface_hub import ModelCard
from PIL import Image

from elit.evaluate.plots import at_best_scale, budgets_of
from elit.evaluate.report import MARK, card_points, command, pipeline_tag, write_card, write_sweep_report
from elit.evaluate.sweep import Point, best

pytestmark = pytest.mark.slow

COST = {"none": 1.0, "cfg": 2.0, "ag": 1.6, "ccfg": 1.5}
PICTURES = ("compute_quality", "guidance", "degradation", "saturation")


def points(budgets=("16", "8", "2"), kinds=tuple(COST), steps=(4, 8)) -> list[Point]:
    """Quality rises with cost, best with CFG at scale 2; every score has a file of its own."""
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
    assert command(replace(ccfg, cache=0.5), Path("m")).endswith(" --cache 0.5")
    top = best(made, "fd")
    assert f"Best fd: {top.scores['fd']:.4g} with 8 steps, budget 16, cfg 2" in text
    assert "elit sample m --steps 8 --budget 16 --guidance cfg --scale 2</p>" in text


@pytest.mark.parametrize(
    ("made", "left_out"),
    [
        (points(("all",), ("none", "cfg")), {"degradation"}),  # a baseline
        (points(("8", "2")), {"degradation"}),  # full budget not swept
        (points(("16",), ("none",), (4,)), {"guidance", "degradation"}),
    ],
)
def test_what_was_not_swept_is_not_shown(made, left_out, tmp_path):
    write_sweep_report(tmp_path, made, "kid", model=Path("m"), grey=False)
    assert {path.stem for path in tmp_path.glob("*.png")} == set(PICTURES) - left_out


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
