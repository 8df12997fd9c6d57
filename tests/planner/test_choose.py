"""Plans by table and by rule, and the cost model: closed forms, fits of made-up times, the file's guards."""

import json
import random
from dataclasses import replace

import pytest
import torch
from conftest import SETTINGS, opened
from diffusers import FlowMatchEulerDiscreteScheduler

import elit
from elit.evaluate.chunks import describe_network, recipe_digest
from elit.models.saved import save_model
from elit.planner.choose import Pricing, ladder, plan
from elit.planner.cost import TERMS, Costs, anatomy, evaluations_of, fit, mean_error
from elit.planner.profile import Profile, grid, held_out, measure_profile, profile_recipe, read_profile
from elit.planner.quality import Curve, find_table, read_quality
from elit.sampling.evaluations import sampling_flops
from elit.sampling.pipeline import ElitPipeline

PRICES = {"run": 0.0, "image": 0.0, "call": 1.0, "core": 0.5, "around": 40.0, "linear": 60.0, "attention": 100.0}
FIVE_PERCENT = {"held_out": True, "ms": 100.0, "predicted_ms": 95.0}
COST = {"prices": PRICES, "overlapping": False}
BASE = {
    **{"guidance": "none", "scale": 1.0, "guidance_budget": None, "count": 100, "detector": "digits"},
    **{"share": 1.0, "gflops": 1.0, "ms": 1.0, "saturation": 0.0, "recipe_sha256": "", "file": ""},
}


def row(budget, steps, fd, **more):
    return BASE | {"budget": budget, "steps": steps, "fd": fd, "accuracy": 0.5} | more


def write(path, rows):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


@pytest.fixture
def model():
    return opened("elit-dit")


@pytest.fixture
def profile(model):
    return Profile(profile_recipe(model), COST, [], 3)


@pytest.fixture
def table(tmp_path):
    guided = {"guidance": "ccfg", "scale": 1.5, "guidance_budget": 1}
    rows = [row("16", steps, fd) for steps, fd in ((4, 50.0), (16, 20.0))]
    rows += [row("4", steps, fd) for steps, fd in ((4, 55.0), (16, 25.0), (32, 22.0))]
    rows += [row("8@0-0.5,16@0.5-1", 8, 19.0), row("8", 4, 15.0, **guided), row("8", 16, 12.0, **guided)]
    return write(tmp_path / "sweep.jsonl", rows)


def test_between_steps_quality_is_on_a_line_in_their_logarithm():
    curve = Curve(elit.Sampling(budget=4), (4, 16, 64), (8.0, 4.0, 3.0))
    assert curve.at(8) == pytest.approx(6.0)
    assert (curve.at(16), curve.at(32)) == (4.0, pytest.approx(3.5))
    assert (curve.at(3), curve.at(65)) == (None, None)


def test_the_plan_is_the_best_of_all_that_keep_to_the_target(model, profile, table):
    for target in (20.0, 40.0, 80.0, 200.0):
        found = plan(model, target_ms=target, profile=profile, table=table)
        assert found.ms <= target
        assert found.metric == "fd"
        price, quality = Pricing(model, 1, profile), read_quality(table)
        for curve in quality.curves:
            for steps in range(curve.steps[0], curve.steps[-1] + 1):
                other = price.plan(curve.sampling(steps))
                assert other.ms > target or curve.at(steps) >= found.quality
        room = plan(model, target_ms=target, profile=replace(profile, rows=[FIVE_PERCENT]), table=table)
        assert 1.05 * room.ms <= target
    assert "ccfg 1.5 at budget 1" in found.words
    below = plan(model, target_ms=5, profile=profile, table=table)  # the rule plans
    assert below.quality is None
    assert "quality is not known" in below.words
    found = plan(model, target_ms=1000, profile=profile, table=table, guidance=None)
    assert (found.steps, found.budget, found.guidance) == (8, "8@0-0.5,16@0.5-1", None)
    found = plan(model, target_ms=1000, profile=profile, table=table, guidance=elit.CCFG(1.5, 1), quality="accuracy")
    assert (found.metric, found.quality, found.steps) == ("accuracy", 0.5, 4)  # of equal ones the cheapest
    by_rate = plan(model, target_images_per_s=50, batch=4, profile=profile, table=table)
    assert by_rate == replace(plan(model, target_ms=80, batch=4, profile=profile, table=table), words=by_rate.words)
    assert plan(model, target_gflops=0.5, table=table).gflops <= 0.5


@pytest.mark.parametrize(
    ("kind", "guidance"),
    [
        *(("elit-dit", each) for each in ("any", None, elit.CFG(2.0), elit.AG(1.5, 4), elit.CCFG(1.5, 2))),
        *(("elit-hdit", each) for each in ("any", elit.AG(1.5, 4))),
        *(("dit", each) for each in ("any", None, elit.CFG(2.0))),
    ],
)
def test_the_rule_gets_cheaper_step_by_step_and_is_valid(kind, guidance):
    model = opened(kind)
    plans = ladder(model, Pricing(model), guidance)
    costs = [each.gflops for each in plans]
    assert costs == sorted(costs, reverse=True)
    assert plans[0].steps == 64
    assert plans[-1].steps == 1


def test_mistakes_are_said(model, profile, table):
    for wrong, says in (
        ({}, "no target given; give one of target_ms, target_gflops, target_images_per_s"),
        ({"target_ms": -1.0}, "target_ms must be a number above 0, got -1"),
        ({"target_ms": 100.0}, "no profile of this machine in MODEL; run elit profile MODEL first"),
        ({"target_ms": 100.0, "profile": profile, "quality": "fd"}, "no table of elit sweep"),
        ({"target_ms": 100.0, "profile": profile, "table": table, "quality": "fid"}, "quality='fid'.*has fd, accuracy"),
        ({"target_ms": 0.5, "batch": 2, "profile": profile}, "least .* ms for 2 images, with 1 step, budget 1"),
    ):
        with pytest.raises(ValueError, match=says):
            plan(model, **wrong)


def test_table_and_profile_are_found_beside_a_saved_model(model, tmp_path):
    folder = tmp_path / "model"
    save_model(model, folder)
    saved = elit.load_model(folder)
    Profile(profile_recipe(saved), COST, [], 3).save(folder)
    assert find_table(folder) is None
    assert elit.plan(folder, target_ms=60) == elit.plan(saved, target_ms=60)
    same = {"model_sha256": recipe_digest(describe_network(saved))}
    write(folder / "sweep.jsonl", [row("16", 4, 9.0, **same), row("16", 8, 8.0, **same)])
    found = elit.plan(folder, target_ms=1000)
    assert found.quality == 8.0
    (folder / "sweep.jsonl").rename(tmp_path / "sweep.jsonl")
    assert elit.plan(folder, target_ms=1000).quality == 8.0


def test_a_table_of_another_network_is_refused_and_a_neighbours_passed_over(tmp_path):
    folder = tmp_path / "model"
    save_model(opened("elit-dit"), folder)
    saved = elit.load_model(folder)
    foreign = [row("16", 8, 8.0, model_sha256="0" * 64)]
    write(tmp_path / "sweep.jsonl", foreign)
    assert elit.plan(saved, target_gflops=1e6).quality is None
    for place in (tmp_path / "sweep.jsonl", write(folder / "sweep.jsonl", foreign)):
        named = {"table": place} if place.parent != folder else {}
        with pytest.raises(ValueError, match=r"table='.*sweep\.jsonl': made for another network"):
            elit.plan(saved, target_gflops=1e6, **named)
    rounded = recipe_digest(describe_network(saved.to(torch.bfloat16)))
    saved = elit.load_model(folder)
    write(folder / "sweep.jsonl", [row("16", 8, 8.0, model_sha256=rounded)])
    assert elit.plan(saved, target_gflops=1e6).quality == 8.0  # a table of the same weights in another dtype
    with torch.no_grad():
        saved.patch_embed.weight.add_(1)
    with pytest.raises(ValueError, match="made for another network"):
        elit.plan(saved, target_gflops=1e6)


def test_a_table_keeps_what_can_be_run_at_other_steps(tmp_path):
    rows = [
        row("16", 4, 9.0),
        row("16", 4, 7.0, count=50),  # fewer samples
        row("16", 8, 1.0, solver="heun"),
        row("16", 8, 1.0, shift=2.0),
        row("1×4, 16×4", 8, 1.0),
        row("all", 8, 3.0),
        BASE | {"detector": "other", "budget": "16", "steps": 16, "fd": None, "fid": 1.0},
    ]
    curves = read_quality(write(tmp_path / "sweep.jsonl", rows)).curves
    found = [(curve.setting.budget, curve.steps, curve.values) for curve in curves]
    assert found == [(16, (4,), (9.0,)), (None, (8,), (3.0,))]
    assert read_quality(tmp_path / "sweep.jsonl", "fid").curves[0].values == (1.0,)


def test_a_plan_samples_what_its_settings_do_bit_for_bit(model, profile, table):
    planned = plan(model, target_ms=100, profile=profile, table=table, batch=2)
    settings = {"budget": planned.budget, "guidance": planned.guidance}
    by_hand = elit.sample(model, [1, 2], steps=planned.steps, **settings)
    assert torch.equal(elit.sample(model, [1, 2], plan=planned), by_hand)
    pipe = ElitPipeline(model, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    options = {"latents": noise, "output_type": "latent"}
    weak = {"guidance_scale": planned.guidance.scale, "guidance_budget": planned.guidance.budget}
    again = pipe([1, 2], num_inference_steps=planned.steps, budget=planned.budget, **weak, **options).images
    assert torch.equal(pipe([1, 2], plan=planned, **options).images, again)


def test_a_cached_curve_is_planned_with_its_threshold_where_it_was_measured(model, profile, tmp_path):
    rows = [row("16", 40, 20.0), row("16", 20, 30.0), row("16", 40, 21.0, cache=100.0)]
    table = write(tmp_path / "sweep.jsonl", rows)
    full = plan(model, target_ms=1e6, profile=profile, table=table)
    assert (full.steps, full.cache, full.quality) == (40, 0.0, 20.0)
    cached = plan(model, target_ms=full.ms / 4, profile=profile, table=table)
    assert (cached.steps, cached.cache, cached.quality) == (40, 100.0, 21.0)
    assert "cache 100" in cached.words
    assert cached.ms == Pricing(model, 1, profile).plan(elit.Sampling(steps=40, budget=16, cache=100.0)).ms
    assert plan(model, target_ms=full.ms / 4, profile=profile, table=table, cache=0.0).cache == 0


@pytest.mark.parametrize("guidance", [elit.CFG(1.25), elit.CCFG(1.25, 1), elit.AG(1.25, 2), None])
@pytest.mark.parametrize("size", [(18, 20), (14, 22)])
def test_gflops_are_exact_where_windows_do_not_divide(size, guidance):
    model = opened("elit-dit", sample_size=size)
    setting = elit.Sampling(steps=3, budget=7, guidance=guidance)
    assert Pricing(model).plan(setting).gflops == pytest.approx(sampling_flops(model, setting) / 1e9, rel=1e-12)


STEP_PRICES = {"run": 0.4, "image": 0.1, "call": 3.0, "core": 1.0, "around": 20.0, "linear": 35.0, "attention": 60.0}


@pytest.mark.parametrize("kind", SETTINGS)
def test_counted_gflops_are_the_closed_form(kind):
    model = opened(kind)
    parts = anatomy(model)
    costs = Costs(**{name: parts[name] for name in ("around", "linear", "square", "shared")})
    settings = [{"steps": 3}, {"steps": 4, "guidance": elit.CFG(2.0, interval=(0.3, 1.0))}]
    if model.budgets:
        least, most = model.budgets[0], model.budgets[-1]
        settings += [{"steps": 4, "budget": f"{least}@0-0.5,{most}@0.5-1", "guidance": elit.CCFG(2.0, least)}]
        settings += [{"steps": 9, "guidance": elit.AG(2.0, least), "cache": 0.5}]
    for chosen in settings:
        exact = sampling_flops(model, **chosen) / 1e9
        assert costs.run_ms(evaluations_of(model, elit.Sampling(**chosen)), 1) == pytest.approx(exact, rel=1e-9)


def runs_of(model, cases):
    return [(evaluations_of(model, sampling), batch) for sampling, batch in cases]


@pytest.mark.parametrize("overlapping", [False, True])
def test_prices_are_found_again_and_predict_what_was_not_fitted(overlapping):
    model = opened("elit-dit")
    parts = anatomy(model)
    truth = Costs.from_prices(STEP_PRICES, parts, overlapping=overlapping)
    known = grid(model.budgets, (1, 4, 16, 64))
    runs, noise = runs_of(model, known), random.Random(0)
    prices, found = fit(runs, [truth.run_ms(*run) * (1 + 0.02 * noise.gauss(0, 1)) for run in runs], parts)
    unknown = runs_of(model, held_out(model.budgets, (1, 64), known))
    assert found == overlapping
    costs = Costs.from_prices(prices, parts, overlapping=found)
    assert mean_error(costs, unknown, [truth.run_ms(*run) for run in unknown]) < 0.03
    assert min(prices.values()) >= 0


@pytest.mark.slow
def test_a_profile_is_measured_saved_and_read(tmp_path):
    model = opened("elit-dit")
    profile = measure_profile(model, batch_sizes=(1, 2), seconds=0)
    assert profile.rounds == 3
    assert all(row["ms"] > 0 for row in profile.rows)
    path = profile.save(tmp_path)
    assert read_profile(path, profile_recipe(model)) == profile


def test_a_profile_of_something_else_is_refused(tmp_path):
    model = opened("elit-dit")
    recipe = profile_recipe(model)
    cost, path = {"prices": dict.fromkeys(TERMS, 1.0), "overlapping": False}, tmp_path / "cut.json"
    for name, value, says in (
        ("model", "0" * 64, "made for another network"),
        ("device", "abacus", "made for device abacus, here it is"),
    ):
        with pytest.raises(ValueError, match=says):
            read_profile(Profile(recipe | {name: value}, cost, [], 3).save(tmp_path), recipe)
    path.write_text(json.dumps({"recipe": recipe}))
    with pytest.raises(ValueError, match="damaged"):
        read_profile(path, recipe)
    assert profile_recipe(model, torch.bfloat16)["dtype"] == "bfloat16"
