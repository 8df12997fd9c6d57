"""Recorded calls: nested trees on disk; pipelines of diffusers as engines, step by step, to the bit."""

import pickle
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import KINDS, MORE, SPLIT, build, inputs, open_branches, pipeline, with_text
from torch import Tensor

import elit
from elit import CCFG, CFG, Sampling
from elit.compat import tree_map_only
from elit.config import DistillConfig
from elit.elastic.context import original
from elit.elastic.engine import PipelineEngine, load_engine
from elit.elastic.load import open_pipeline, save_add_on
from elit.elastic.pipelines import (
    RecordedCalls,
    Requests,
    join_rows,
    layout_of,
    output_tensor,
    record,
    save_calls,
    take_rows,
)
from elit.sampling.pictures import from_pictures


def recorded(folder, sizes):
    pipe = with_text("FluxPipeline")
    config = DistillConfig(sizes=sizes, call=("max_sequence_length=5",), teacher_batch=2, teacher_steps=4)
    requests = Requests(pipe, config, ["a boat", "a tree"] * 2 * len(sizes))
    calls = [record(pipe, request) for request in requests.batches()]
    one = record(pipe, requests.request(["a boat"], number=0, steps=1))
    layout = layout_of(one[0][1], calls[0][0][1], (1, 2))
    for number, of_request in enumerate(calls):
        save_calls(folder / f"{number:06d}.pt", of_request, layout)
    return pipe, calls


@pytest.mark.parametrize("sizes", [("64x32", "32x64"), ("32x32", "64x64"), ("32x32", "64x32", "32x64")])
def test_sizes_with_as_many_tokens_are_never_in_one_batch(tmp_path, sizes):
    pipe, calls = recorded(tmp_path, sizes)
    assert [len(each) for each in calls] == [4] * len(sizes) + [3] * len(sizes)  # each has both numbers of steps
    examples = pickle.loads(pickle.dumps(RecordedCalls(tmp_path)))  # as workers that are spawned get it
    assert len(examples.buckets) == len(sizes)
    for bucket in examples.buckets:
        outputs, call = examples.__getitems__([int(entry) for entry in bucket])
        with torch.no_grad(), original():
            again = output_tensor(pipe.transformer(**call.arguments))
        assert torch.allclose(again, outputs, atol=1e-5)


@pytest.mark.parametrize(
    ("prompts", "sizes"), [(2, ("32x32",)), (4, ("32x32",)), (4, ("64x32", "32x64")), (6, ("8x8", "8x16"))]
)
def test_each_prompt_is_drawn_at_every_size_and_number_of_steps(prompts, sizes):
    names = [str(number) for number in range(prompts)]
    config = DistillConfig(sizes=sizes, teacher_batch=2, teacher_steps=4, trajectories=prompts * 2 * len(sizes))
    requests = Requests(with_text("FluxPipeline"), config, names)
    drawn = list(requests.batches())
    ways = [
        (name, each["num_inference_steps"], each["height"], each["width"]) for each in drawn for name in each["prompt"]
    ]
    assert len(set(ways)) == len(ways)
    seeds = {each["generator"].initial_seed() for each in drawn}
    assert len(seeds) == len(drawn)
    assert requests.validation()["generator"].initial_seed() not in seeds


def test_a_damaged_file_and_an_empty_folder_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="no recorded calls"):
        RecordedCalls(tmp_path)
    (tmp_path / "000000.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"cannot read '.*000000\.pt': damaged") as refusal:
        RecordedCalls(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", KINDS + MORE)
def test_rows_come_apart_and_together_again(kind):
    one, three = inputs(kind, batch=1), inputs(kind, batch=3)
    layout = layout_of(one, three, (1, 3))
    again = join_rows(layout, [take_rows(layout, three, slice(row, row + 1)) for row in range(3)])
    with torch.no_grad():
        outputs = [output_tensor(build(kind)(**given, return_dict=False)) for given in (three, again)]
    assert torch.equal(*outputs)
    assert repr(tree_map_only(Tensor, Tensor.tolist, again)) == repr(tree_map_only(Tensor, Tensor.tolist, three))


def test_a_mask_that_only_some_texts_have_goes_with_its_rows(tmp_path):
    """One text needs no padding and has no mask, by which the layout was told; texts of two lengths have one."""
    transformer, call = build("QwenImageTransformer2DModel"), inputs("QwenImageTransformer2DModel", batch=2)
    length = call["encoder_hidden_states"].shape[1]
    mask = torch.arange(length) < torch.tensor([[length], [length - 2]])
    one, two = ({**inputs("QwenImageTransformer2DModel", batch=n), "encoder_hidden_states_mask": None} for n in (1, 2))
    given = two | {"encoder_hidden_states_mask": mask}
    with torch.no_grad():
        wanted, unpadded = (output_tensor(transformer(**each, return_dict=False)) for each in (given, two))
    calls = [("all", given, wanted), ("all", two, unpadded)]
    save_calls(tmp_path / "000000.pt", calls, layout_of(one, two, (1, 2)))
    examples = RecordedCalls(tmp_path)
    assert [len(bucket) for bucket in examples.buckets] == [2, 2]
    for rows in ([0], [1], [1, 0, 1], [2, 3]):
        outputs, batch = examples.__getitems__(rows)
        with torch.no_grad():
            again = output_tensor(transformer(**batch.arguments, return_dict=False))
        assert torch.allclose(again, outputs, atol=1e-5)


def engine_of(name):
    pipe = with_text(name)
    open_branches(elit.elastify(pipe.transformer, **SPLIT))
    return PipelineEngine(pipe, name)


def alone(engine, condition, seed, budget, guidance=None, **call):
    generator = torch.Generator().manual_seed(seed)
    name = "prompt" if engine.takes_text else "class_labels"
    with elit.budget(budget) if guidance is None else elit.budget(budget, guidance=guidance):
        return from_pictures(engine.pipe(**{name: [condition]}, generator=generator, **call).images)


CASES = {
    "QwenImagePipeline": {"true_cfg_scale": 3.0, "negative_prompt": ["dull"]},
    "FluxPipeline": {"true_cfg_scale": 1.0},
    "StableDiffusion3Pipeline": {"guidance_scale": 3.0, "negative_prompt": ["dull"]},
    "DiTPipeline": {"guidance_scale": 4.0},
}


@pytest.mark.parametrize("name", CASES)
def test_two_runs_in_turn_are_each_the_pipelines_own_to_the_bit(name):
    engine, own = engine_of(name), CASES[name]
    scale = own[engine.guidance_argument]
    guidance, weak = (CCFG(scale, 1), 1) if scale > 1 else (None, None)
    size, pixels = ((32, 64), {"width": 32, "height": 64}) if engine.multiple else (None, {})
    runs, pictures = [], []
    for condition, seed, steps, budget in (("7", 3, 2, 4), ("9", 4, 3, "25%@0-0.5,100%@0.5-1")):
        sampling = Sampling(steps=steps, budget=budget, guidance=guidance)
        runs.append(engine.begin([condition], [seed], sampling, size=size, negatives=["dull"]))
        given = condition if engine.takes_text else int(condition)
        pictures.append(alone(engine, given, seed, budget, weak, num_inference_steps=steps, **own, **pixels))
    while going := [run for run in runs if not run.done]:
        engine.step(going)
    assert [run.error for run in runs] == [None, None]
    assert all(torch.equal(run.pictures(), right) for run, right in zip(runs, pictures, strict=True))


def test_a_run_can_be_closed_and_an_error_is_its_own():
    engine = engine_of("FluxPipeline")
    before = threading.active_count()
    run = engine.begin(["a boat"], [0], Sampling(steps=5), size=(32, 32))
    run.step()
    run.close()
    run.thread.join(10)
    assert threading.active_count() == before
    assert run.output is None
    wrong, right = (
        engine.begin(["a boat"], [0], Sampling(steps=2, budget=budget), size=(32, 32)) for budget in (99, 4)
    )
    engine.step([wrong, right])
    assert "got 99" in str(wrong.error)
    assert right.error is None
    right.close()
    with pytest.raises(ValueError, match="got 99"):
        wrong.step()


def test_costs_fall_with_the_budget_and_sizes_and_settings_are_checked():
    engine = engine_of("StableDiffusion3Pipeline")
    full, small = Sampling(steps=1), Sampling(steps=1, budget=1)
    assert engine.gflops(small) < engine.gflops(Sampling(steps=1, budget=8)) < engine.gflops(full)
    assert engine.gflops(Sampling(steps=1, budget=4), (32, 64)) < engine.gflops(Sampling(steps=1, budget=4))
    assert engine.gflops(replace(full, guidance=CFG(2.0))) == 2 * engine.gflops(full)
    assert engine.gflops(replace(full, guidance=CCFG(2.0, 1))) == engine.gflops(full) + engine.gflops(small)
    assert (engine.size, engine.multiple, engine.default_scale) == ((64, 64), 8, 7.0)
    engine.network.elastic_record = replace(engine.network.elastic_record, size=(32, 64))  # height, width
    assert PipelineEngine(engine.pipe).size == (64, 32)
    assert engine.guidance_kinds == ("none", "cfg", "ccfg")
    with pytest.raises(ValueError, match="width must be a multiple of 8, got 33"):
        engine.begin(["a boat"], [0], full, size=(33, 64))
    for change, message in (
        ({"solver": "heun"}, "solver=heun is not supported"),
        ({"cache": 0.1}, "cache=0.1 is not supported"),
        ({"guidance": elit.AG(2.0, 1)}, "guidance must be one of"),
        ({"guidance": CFG(2.0, interval=(0, 0.5))}, "guidance_interval must be 0 to 1"),
        ({"budget": (1, 2)}, "step_budgets must be 1, one a step, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.begin(["a boat"], [0], replace(full, **change))
    classes = engine_of("DiTPipeline")
    assert (classes.takes_text, len(classes.classes), classes.size) == (False, 1000, (64, 64))
    for wrong in ("1000", "boat"):
        with pytest.raises(ValueError, match="labels"):
            classes.begin([wrong], [0], full)
    with pytest.raises(ValueError, match="size must be 64x64 for a DiTPipeline, got '32x32'"):
        classes.begin(["1"], [0], full, size=(32, 32))
    with pytest.raises(ValueError, match="not elastified"):
        PipelineEngine(pipeline("DiTPipeline"), "plain")


def test_a_pipeline_and_an_add_on_are_found_by_their_folders(tmp_path):
    pipe = pipeline("DiTPipeline")
    pipe.save_pretrained(tmp_path / "base")
    assert open_pipeline(tmp_path / "base") is None
    assert open_pipeline("fashion") is None
    open_branches(elit.elastify(pipe.transformer, **SPLIT))
    pipe.save_pretrained(tmp_path / "whole")
    weights = {f"elastic.{name}": value for name, value in pipe.transformer.elastic.state_dict().items()}
    (tmp_path / "add-on").mkdir()
    save_add_on(pipe.transformer, weights, tmp_path / "add-on")
    with pytest.raises(ValueError, match="does not name its pipeline"):
        open_pipeline(tmp_path / "add-on")
    pipe.transformer.elastic_record = replace(pipe.transformer.elastic_record, base=str(tmp_path / "base"))
    save_add_on(pipe.transformer, weights, tmp_path / "add-on")
    pictures = []
    for name in ("whole", "add-on"):
        assert list(open_pipeline(tmp_path / name).budgets) == list(range(1, 17))
        engine = load_engine(tmp_path / name)
        run = engine.begin(["3"], [0], Sampling(steps=1, budget=4, guidance=CFG(4.0)))
        run.step()
        pictures.append(run.pictures())
    assert np.array_equal(*pictures)
    assert torch.equal(pictures[0], alone(engine, 3, 0, 4, num_inference_steps=1))
