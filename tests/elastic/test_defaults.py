"""elit.elastify alone: a pipeline, its defaults, a budget for references."""

from pathlib import Path

import diffusers
import pytest
import torch
from tiny import KINDS, MORE, Spy, build, draw, inputs, pipeline

import elit
from elit.elastic.families import FAMILIES
from elit.elastic.load import save_add_on
from elit.elastic.surgery import default_blocks


def test_read_and_write_lie_in_the_papers_proportion():
    assert default_blocks(60) == (8, 52)
    assert default_blocks(57) == (8, 49)  # Flux
    assert [default_blocks(depth) for depth in (1, 2, 3, 4)] == [(0, 1), (0, 2), (1, 2), (1, 3)]


@pytest.mark.parametrize("kind", KINDS + MORE)
def test_every_class_has_a_window_that_suits_it(kind):
    record = elit.elastify(build(kind)).elastic_record
    assert (len(record.window), record.read_after, record.write_after) == (FAMILIES[kind].axes, 1, 3)


def test_a_pipeline_is_elastified_in_place_and_is_what_it_was():
    right = draw(pipeline("FluxPipeline"))
    pipe = pipeline("FluxPipeline")
    assert elit.elastify(pipe) is pipe
    assert torch.equal(draw(pipe), right)
    with elit.budget(0.25):
        assert not torch.equal(draw(pipe), right)
    with pytest.raises(ValueError, match="cannot elastify a transformer twice"):
        elit.elastify(pipe)
    with pytest.raises(ValueError, match="context parallel is not supported"):
        pipe.transformer.enable_parallelism(config=diffusers.ContextParallelConfig(ring_degree=2))
    pipe.transformer = None
    with pytest.raises(ValueError, match="got a FluxPipeline without one"):
        elit.elastify(pipe)


WAN = "WanTransformer3DModel"


def wan(**parts):
    parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.WanPipeline(tokenizer=None, text_encoder=None, vae=None, **parts)


@pytest.mark.parametrize("names", [("transformer",), ("transformer_2",), ("transformer", "transformer_2")])
def test_a_video_pipeline_keeps_its_dials_when_it_is_loaded(tmp_path, names):
    """diffusers' base class drops parts whose default is None, as both transformers of Wan are."""
    pipe = elit.elastify(wan(**{name: build(WAN) for name in names}), window=(2, 2, 4))
    pipe.save_pretrained(tmp_path)
    again = elit.load_elastic(tmp_path, tokenizer=None, text_encoder=None, vae=None)
    for name in names:
        assert getattr(again, name).budgets == getattr(pipe, name).budgets == tuple(range(1, 17))


def test_an_add_on_for_one_of_two_transformers_is_refused(tmp_path):
    transformer = elit.elastify(build(WAN), window=(2, 2, 4))
    save_add_on(transformer, {f"elastic.{name}": w for name, w in transformer.elastic.state_dict().items()}, tmp_path)
    parts = {name: build(WAN) for name in ("transformer", "transformer_2")}
    with pytest.raises(ValueError, match="pipeline must have one transformer, got a WanPipeline with two"):
        elit.load_elastic(wan(**parts), tmp_path)
    assert elit.load_elastic(wan(transformer=parts["transformer"]), tmp_path).transformer.budgets == tuple(range(1, 17))


@pytest.mark.parametrize("kind", ["QwenImageTransformer2DModel", "FluxTransformer2DModel"])
def test_references_have_a_budget_of_their_own(kind, monkeypatch):
    x, model = inputs(kind), elit.elastify(build(kind), window=(4, 4))
    x["hidden_states"] = torch.cat((x["hidden_states"],) * 2, 1)
    if kind.startswith("Qwen"):
        x["img_shapes"] = [[(1, 8, 8), (1, 8, 8)]] * 2
    else:
        x["img_ids"] = torch.cat((x["img_ids"], x["img_ids"] + torch.tensor([1.0, 0, 0])))
    spy = Spy(model, monkeypatch)
    with torch.no_grad():
        with elit.budget(0.5, reference=0.25):
            assert model(**x).sample.isfinite().all()
        with elit.budget(0.5):
            model(**x)
        with elit.budget(1.0, reference=1):
            low = model(**x).sample
        assert not torch.equal(low, model(**x).sample)
    assert spy.plans[:3] == [[8, 4], [8, 8], [16, 1]]
    with pytest.raises(ValueError, match="got 0"), elit.budget(0.5, reference=0):
        pass


@pytest.mark.parametrize("kind", ["QwenImageTransformer2DModel", "WanTransformer3DModel"])
def test_real_grids_cost_what_the_closed_form_says(kind, monkeypatch):
    """83×83 and 21×30×52 tokens; studies/pipelines/sizes.py has the others, and their errors."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "studies" / "pipelines"))
    from sizes import GRIDS, flops

    seen, said = flops(kind, GRIDS[kind][0], 0.25)
    assert seen == pytest.approx(said, rel=0.02)
