"""Stock pipelines as services and pages use them: their own calls, step by step, to the bit."""

import threading

import diffusers
import numpy as np
import pytest
import torch
from tiny import open_branches, pipeline, with_text

import elit
from elit.elastic.stock import StockPipeline, find_stock
from elit.elastic.storage import save_add_on

SPLIT = {"read_after": 1, "write_after": 3, "window": (4, 4)}


def stock_pipeline(name):
    pipe = with_text(name)
    open_branches(elit.elastify(pipe.transformer, **SPLIT))
    return StockPipeline(pipe, name)


def alone(stock, condition, seed, budget, guidance=None, **call):
    """The pipeline's own call."""
    generator = torch.Generator().manual_seed(seed)
    name = "prompt" if stock.takes_text else "class_labels"
    with elit.budget(budget) if guidance is None else elit.budget(budget, guidance=guidance):
        return stock.pipe(**{name: [condition]}, generator=generator, **call).images[0]


CASES = {
    "QwenImagePipeline": {"scale": 3.0, "own": {"true_cfg_scale": 3.0, "negative_prompt": ["dull"]}},
    "FluxPipeline": {"scale": 1.0, "own": {"true_cfg_scale": 1.0}},
    "StableDiffusion3Pipeline": {"scale": 3.0, "own": {"guidance_scale": 3.0, "negative_prompt": ["dull"]}},
    "DiTPipeline": {"scale": 4.0, "own": {"guidance_scale": 4.0}},
}


@pytest.mark.parametrize("name", CASES)
def test_two_calls_in_turn_are_each_the_pipelines_own_to_the_bit(name):
    stock, case = stock_pipeline(name), CASES[name]
    size = {"width": 32, "height": 64} if stock.has_sizes else {}
    weak = 1 if case["scale"] > 1 else None
    conditions = ["a boat", "a red kite"] if stock.takes_text else ["7", "9"]
    calls = [
        stock.call(
            [condition],
            [seed],
            steps=steps,
            budget=budget,
            scale=case["scale"],
            guidance_budget=weak,
            size=(32, 64) if size else None,
            negatives=["dull"],
        )
        for condition, seed, steps, budget in zip(conditions, (3, 4), (2, 3), (4, "25%@0-0.5,100%@0.5-1"), strict=True)
    ]
    steps = 0
    while any([call.advance() for call in calls]):  # noqa: C419  both go on
        steps += 1
    assert [call.steps for call in calls] == [2, 3]
    own = [7, 9] if not stock.takes_text else conditions
    pictures = [
        alone(stock, own[0], 3, 4, weak, num_inference_steps=2, **case["own"], **size),
        alone(stock, own[1], 4, "25%@0-0.5,100%@0.5-1", weak, num_inference_steps=3, **case["own"], **size),
    ]
    for call, right in zip(calls, pictures, strict=True):
        assert np.array_equal(np.asarray(call.output.images[0]), np.asarray(right))


def test_a_call_can_be_given_up_and_its_errors_come_out():
    stock = stock_pipeline("FluxPipeline")
    before = threading.active_count()
    call = stock.call(["a boat"], [0], steps=5, size=(32, 32))
    assert call.advance()
    call.give_up()
    call._thread.join(10)
    assert threading.active_count() == before
    assert call.output is None
    assert not call.advance()
    with pytest.raises(ValueError, match="got 99"):
        stock.call(["a boat"], [0], steps=5, size=(32, 32), budget=99).advance()


def test_costs_fall_with_the_budget_and_sizes_are_checked():
    stock = stock_pipeline("StableDiffusion3Pipeline")
    assert stock.flops(budget=1, size=(64, 64)) < stock.flops(budget=8, size=(64, 64)) < stock.flops(size=(64, 64))
    assert stock.flops(budget=4, size=(32, 64)) < stock.flops(budget=4, size=(64, 64))
    assert (stock.size, stock.multiple, stock.own_scale, stock.guides_by) == ((64, 64), 8, 7.0, "guidance_scale")
    with pytest.raises(ValueError, match="width=33: give a multiple of 8"):
        stock.call(["a boat"], [0], steps=1, size=(33, 64))
    classes = stock_pipeline("DiTPipeline")
    assert (classes.takes_text, len(classes.classes), classes.size) == (False, 1000, (64, 64))
    for wrong in ("1000", "boat"):
        with pytest.raises(ValueError, match=r"labels="):
            classes.call([wrong], [0], steps=1)
    with pytest.raises(ValueError, match="size=32x32: DiTPipeline makes 64x64"):
        classes.call(["1"], [0], steps=1, size=(32, 32))
    with pytest.raises(ValueError, match="has no dial"):
        StockPipeline(pipeline("DiTPipeline"), "plain")


def test_a_pipeline_and_an_add_on_are_found_by_their_folders(tmp_path):
    pipe = pipeline("DiTPipeline")
    pipe.save_pretrained(tmp_path / "base")
    assert find_stock(tmp_path / "base") is None
    assert find_stock("fashion") is None
    open_branches(elit.elastify(pipe.transformer, **SPLIT))
    pipe.save_pretrained(tmp_path / "whole")
    weights = {f"elastic.{name}": value for name, value in pipe.transformer.elastic.state_dict().items()}
    (tmp_path / "add-on").mkdir()
    save_add_on(pipe.transformer, weights, tmp_path / "add-on")
    with pytest.raises(ValueError, match="does not name its pipeline"):
        find_stock(tmp_path / "add-on")
    import dataclasses

    record = pipe.transformer.elastic_record
    pipe.transformer.elastic_record = dataclasses.replace(record, base=str(tmp_path / "base"))
    save_add_on(pipe.transformer, weights, tmp_path / "add-on")
    pictures = []
    for name in ("whole", "add-on"):
        stock = find_stock(tmp_path / name)
        assert (stock.kind, list(stock.budgets)) == (diffusers.DiTPipeline, list(range(1, 17)))
        loaded = StockPipeline.load(stock, device="cpu", dtype=torch.float32)
        pictures.append(np.asarray(loaded.call(["3"], [0], steps=1, budget=4).finish().images[0]))
    assert np.array_equal(*pictures)
    assert np.array_equal(pictures[0], np.asarray(alone(loaded, 3, 0, 4, num_inference_steps=1)))
