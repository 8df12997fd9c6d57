"""Stock diffusers pipelines, unedited, with the dial: budgets, schedules, CCFG, caches, LoRA, saving."""

import diffusers
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from peft import LoraConfig
from tiny import PIPELINES, SPLIT, Spy, draw, elastic_pipeline, open_branches, pipeline

import elit

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", PIPELINES)
def test_a_budget_of_one_changes_no_bit(name):
    right = draw(pipeline(name), batch=2)
    pipe = elastic_pipeline(name)
    assert torch.equal(draw(pipe, batch=2), right)
    with elit.budget(1.0, guidance=1.0):
        assert torch.equal(draw(pipe, batch=2), right)
    open_branches(pipe.transformer)
    drawn = []
    for settings in ({}, {"guidance": 0.25}, {"guidance": 1}):
        with elit.budget(0.25, **settings):
            drawn.append(draw(pipe, batch=2))
    low, same, weak = drawn
    assert low.isfinite().all()
    assert torch.equal(same, low)  # halves of a batch are as if run alone
    assert not torch.equal(low, right)
    assert not torch.equal(weak, low)


@pytest.mark.parametrize("name", PIPELINES)
def test_branches_and_steps_run_at_the_budgets_asked_for(name, monkeypatch):
    pipe = elastic_pipeline(name)
    spy = Spy(pipe.transformer, monkeypatch)
    apart = name in ("QwenImagePipeline", "FluxPipeline")
    with elit.budget(0.5):
        draw(pipe, batch=2)
    assert spy.seen == ([(8, 2)] * 4 if apart else [(8, 4)] * 2)
    spy.seen.clear()
    with elit.budget([4, 16], guidance=1):
        draw(pipe, batch=2)
    order = [(1, 2), (4, 2), (1, 2), (16, 2)]  # Stable Diffusion 3 puts the unconditional half first
    assert spy.seen == (order if name == "StableDiffusion3Pipeline" else [order[i] for i in (1, 0, 3, 2)])
    spy.seen.clear()
    with elit.budget("25%@0-0.3,100%@0.3-1"):
        draw(pipe, steps=4)
    kept = spy.kept()
    assert kept == sorted(kept)
    assert set(kept) == {4, 16}
    with elit.budget([4]), pytest.raises(ValueError, match="a list of 1 budgets for 2 steps"):
        draw(pipe)


@pytest.mark.parametrize("name", ["QwenImagePipeline", "FluxPipeline"])
def test_first_block_cache_works_on_top(name, monkeypatch):
    pipe = elastic_pipeline(name, opened=True)
    spy = Spy(pipe.transformer, monkeypatch)
    with elit.budget(4, guidance=1):
        right = draw(pipe, steps=3)
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
        assert torch.allclose(draw(pipe, steps=3), right, atol=1e-5)
        pipe.transformer.disable_cache()
        spy.seen.clear()
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
        assert draw(pipe, steps=3).isfinite().all()
        assert spy.seen == [(4, 1), (1, 1)]  # the core runs in the first step only
        pipe.transformer.disable_cache()
        assert torch.equal(draw(pipe, steps=3), right)
    plain = pipeline(name)
    plain.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="elastify it first"):
        elit.elastify(plain.transformer, **SPLIT)


@pytest.mark.parametrize("name", PIPELINES[:3])
@pytest.mark.parametrize("before", [True, False])
def test_a_lora_works_on_top(name, before):
    original, pipe = pipeline(name), pipeline(name) if before else elastic_pipeline(name)
    right = draw(original)
    for each in (original, pipe):
        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
        each.transformer.add_adapter(lora)
    if before:
        elit.elastify(pipe, **SPLIT)
    assert torch.equal(draw(pipe), draw(original))
    assert not torch.equal(draw(pipe), right)
    with pytest.raises(ValueError, match="with LoRA adapters"):
        pipe.transformer.save_pretrained("nowhere")
    with elit.budget(0.5):
        half = draw(pipe)
        pipe.transformer.disable_adapters()
        assert not torch.equal(draw(pipe), half)


@pytest.mark.parametrize("name", PIPELINES)
def test_saved_and_loaded_bit_for_bit(name, tmp_path):
    right = draw(pipeline(name))
    pipe = elastic_pipeline(name, opened=True)
    pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob(".*"))
    assert "elastic" not in (tmp_path / "transformer" / "config.json").read_text()
    parts = {part: None for part in pipe.components if part not in ("transformer", "vae", "scheduler")}
    again = elit.load_elastic(tmp_path, **parts)
    again.set_progress_bar_config(disable=True)
    half = elit.load_elastic(tmp_path / "transformer", torch_dtype=torch.bfloat16)
    assert half.elastic.latents.dtype == half.dtype == torch.bfloat16
    with elit.budget(0.5, guidance=2):
        # The autoencoder's output depends, in the last bit, on where diffusers maps its weights.
        assert torch.equal(draw(again, output_type="latent"), draw(pipe, output_type="latent"))
    assert half.budgets == pipe.transformer.budgets
    plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path, **parts)
    plain.set_progress_bar_config(disable=True)
    assert torch.allclose(draw(plain), right, atol=1e-5)


def test_a_core_that_was_trained_along_does_not_load_alone(tmp_path):
    pipe = elastic_pipeline("DiTPipeline", opened=True)
    pipe.save_pretrained(tmp_path)
    with torch.no_grad():
        pipe.transformer.transformer_blocks[1].attn1.to_q.weight.mul_(1.01)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="no file named"):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="no file named"):
        diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "transformer")
    again = elit.load_elastic(tmp_path)
    assert torch.equal(draw(again), draw(pipe))
    again.save_pretrained(tmp_path / "again")  # what was trained stays so
    with pytest.raises(OSError, match="no file named"):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again")


def test_damaged_folders_are_one_line(tmp_path):
    model = elastic_pipeline("DiTPipeline").transformer
    for name, content, said in (
        ("elastic.json", "{", "its elastic.json is damaged"),
        ("elastic.safetensors", "short", "its elastic.safetensors is missing or damaged"),
    ):
        model.save_pretrained(tmp_path / "bad")
        (tmp_path / "bad" / name).write_text(content)
        with pytest.raises(ValueError, match=said):
            elit.load_elastic(tmp_path / "bad")
    (tmp_path / "bad" / "elastic.json").unlink()
    with pytest.raises(ValueError, match=r"no elastic\.json in it"):
        elit.load_elastic(tmp_path / "bad")
