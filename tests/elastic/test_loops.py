"""Budgets bound to the scheduler's timesteps, to the branch that runs, and to a transformer with a dial."""

from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import table
import tiny
import torch
from parts import PIPELINES as STOCK
from tiny import SPLIT, TEXT, Spy, build, draw, elastic_pipeline, inputs, pipeline, window

import elit
from elit.elastic.context import current_block


def image_to_image(pipe, steps, strength):
    draw(pipe, steps, image=torch.rand(1, 3, 64, 64), strength=strength, true_cfg_scale=1.0)


def test_image_to_image_takes_the_budgets_of_the_steps_that_it_runs(monkeypatch):
    pipe = diffusers.FluxImg2ImgPipeline.from_pipe(elastic_pipeline("FluxPipeline"))
    pipe.set_progress_bar_config(disable=True)
    spy = Spy(pipe.transformer, monkeypatch)
    with elit.budget(list(range(1, 9))):
        image_to_image(pipe, 8, 0.5)
        image_to_image(pipe, 8, 0.25)  # a second run starts anew
    assert spy.kept() == [5, 6, 7, 8, 7, 8]
    with elit.budget([3, 4]):
        image_to_image(pipe, 4, 0.5)  # one for each step that runs
    assert spy.kept() == [3, 4]
    with elit.budget([1, 2, 3]), pytest.raises(ValueError, match="one a step, got a list of 3 budgets for 4 steps"):
        image_to_image(pipe, 4, 0.5)


@pytest.mark.parametrize(
    ("kind", "right"),
    [
        ("KDPM2DiscreteScheduler", [1, 1, 2, 2, 3, 3, 4]),
        ("PNDMScheduler", [1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4]),
        ("HeunDiscreteScheduler", [1, 2, 2, 3, 3, 4, 4]),
        ("DPMSolverMultistepScheduler", [1, 2, 3, 4]),
    ],
)
def test_a_scheduler_with_more_calls_than_steps_spreads_the_list(kind, right, monkeypatch):
    pipe = elastic_pipeline("DiTPipeline")
    pipe.scheduler = getattr(diffusers, kind)()
    spy = Spy(pipe.transformer, monkeypatch)
    with elit.budget([1, 2, 3, 4]):
        for _ in range(2):
            pipe([7], 1.0, torch.Generator().manual_seed(0), num_inference_steps=4, output_type="pt")
    assert spy.kept() == right * 2
    for wrong in ([1, 2, 3], [1, 2, 3, 4, 5]):
        with elit.budget(wrong), pytest.raises(ValueError, match="budget must be one a step, got a list of"):
            pipe([7], 1.0, num_inference_steps=4, output_type="pt")


def test_a_loop_of_ones_own_starts_anew_and_uses_its_list_up(monkeypatch):
    model = elit.elastify(build("QwenImageTransformer2DModel"), **SPLIT)
    spy, x = Spy(model, monkeypatch), inputs("QwenImageTransformer2DModel", batch=1)

    def loop(*levels):
        with torch.no_grad():
            for level in levels:
                model(**x | {"timestep": torch.tensor([level])})

    with elit.budget([4, 8]):
        loop(0.9, 0.5)
        loop(0.9, 0.9, 0.5)
    assert spy.kept() == [4, 8, 4, 4, 8]
    with pytest.raises(ValueError, match="got a list of 2 budgets in step 3"), elit.budget([4, 8]):
        loop(0.9, 0.5, 0.2)
    with pytest.raises(ValueError, match="got a list of 2 budgets for 1 steps"), elit.budget([4, 8]):
        loop(0.9)


LABELS = ("cond", "uncond")
FROM = {  # where the pipelines of a class have both branches in one batch, only a guider has them apart
    **{f"{kind}Transformer2DModel": LABELS for kind in ("QwenImage", "Flux", "Lumina2")},
    "WanTransformer3DModel": LABELS,
    **{f"{kind}Transformer2DModel": () for kind in ("SD3", "ZImage")},
    "CogVideoXTransformer3DModel": (), "LTX2VideoTransformer3DModel": (),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "labels"), FROM.items())
def test_branches_are_those_that_somebody_names(kind, labels, monkeypatch):
    model = elit.elastify(build(kind), **SPLIT | {"window": window(kind)})
    spy, x = Spy(model, monkeypatch), inputs(kind, batch=1 if labels else 2)
    guider = diffusers.ClassifierFreeGuidance(3.0)
    guider.set_state(step=0, num_inference_steps=2, timestep=torch.tensor(1000))
    with torch.no_grad():
        with elit.budget(8, guidance=1):
            for branch in (*labels, "pred_cond", "pred_uncond"):
                with model.cache_context(branch):
                    model(**x)
        assert spy.kept() == [8, 1] * (2 if labels else 1)
        for doubled in (None, True) if labels else (None,):
            said = pytest.raises(ValueError, match="doubled must be given where")
            with said, elit.budget(8, guidance=1, doubled=doubled):
                model(**x)
        for doubled in (False,) if labels else (True, False):
            with elit.budget(8, guidance=1, doubled=doubled):
                model(**x)
        assert spy.kept() == ([8] if labels else [8, 1, 8] if kind.startswith("Z") else [1, 8, 8])
        with elit.budget(8, guidance=1):
            for guider_state_batch in guider.prepare_inputs({"text": (torch.ones(1), torch.zeros(1))}):
                guider_state_batch.noise_pred = model(**x)
        assert spy.kept() == [8, 1]


def test_a_block_without_effect_is_said():
    x, model = inputs("DiTTransformer2DModel"), elit.elastify(build("DiTTransformer2DModel"), **SPLIT)
    with pytest.warns(UserWarning, match="elit.budget had no effect"), elit.budget(0.5):
        draw(pipeline("DiTPipeline"), steps=1)
    said = "each thread needs a block of its own"
    with pytest.warns(UserWarning, match=said), elit.budget(0.5), ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: model(**x)).result()
    with pytest.raises(RuntimeError, match="mine"), elit.budget(0.5):
        raise RuntimeError("mine")


@pytest.fixture
def sd3(monkeypatch):
    pipe = elastic_pipeline("StableDiffusion3Pipeline")
    return pipe, Spy(pipe.transformer, monkeypatch)


def draw_alike(pipe, batch: int = 2, **settings):
    latents = torch.ones(batch, 4, 16, 16)
    return tiny.draw(pipe, batch=batch, latents=latents, output_type="latent", **settings)


def test_two_prompts_with_the_same_noise_are_no_two_branches(sd3):
    pipe, spy = sd3
    with elit.budget(8, guidance=1):
        draw_alike(pipe, guidance_scale=1.0)
        draw_alike(pipe, batch=1, guidance_scale=3.0)  # the same number of samples, of two branches
    assert spy.seen == [(8, 2)] * 2 + [(1, 1), (8, 1)] * 2


def test_pixart_says_it_in_a_name_of_its_own(monkeypatch):
    pipe = diffusers.PixArtSigmaPipeline(**STOCK["PixArtAlphaPipeline"].make().components)
    pipe.set_progress_bar_config(disable=True)
    elit.elastify(pipe, **SPLIT)
    spy = Spy(pipe.transformer, monkeypatch)
    text, mask = torch.randn(2, TEXT, 20), torch.ones(2, TEXT)
    negative = {"negative_prompt_embeds": text, "negative_prompt_attention_mask": mask, "negative_prompt": None}
    call = {"prompt_embeds": text, "prompt_attention_mask": mask, "latents": torch.ones(2, 4, 16, 16)} | negative
    call |= {"height": 64, "width": 64, "num_inference_steps": 1, "output_type": "latent"}
    with elit.budget(8, guidance=1):
        for scale in (1.0, 3.0):
            pipe(**call, use_resolution_binning=False, guidance_scale=scale)
    assert spy.seen == [(8, 2), (1, 2), (8, 2)]


def test_skip_layer_guidance_runs_the_conditional_branch_once_more(sd3):
    pipe, spy = sd3
    skip = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    with elit.budget([4, 16], guidance=1):
        draw_alike(pipe, guidance_scale=3.0, **skip)
    assert spy.seen == [(1, 2), (4, 2), (1, 2), (16, 2), (16, 2)]  # it starts behind the first step


def test_a_second_order_scheduler_counts_timesteps(sd3):
    pipe, spy = sd3
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    with elit.budget([4, 8, 16]):
        draw_alike(pipe, batch=1, num_inference_steps=3, guidance_scale=1.0)
    assert spy.kept() == [4, 8, 8, 16, 16]
    with elit.budget([4, 8]), pytest.raises(ValueError, match="a list of 2 budgets for 3 steps"):
        draw_alike(pipe, batch=1, num_inference_steps=3, guidance_scale=1.0)


def test_steps_that_share_a_timestep_in_bfloat16_are_two(monkeypatch):
    pipe = elastic_pipeline("FluxPipeline").to(torch.bfloat16)
    spy = Spy(pipe.transformer, monkeypatch)
    with elit.budget([4, 8, 16]):
        tiny.draw(pipe, steps=3, sigmas=[1.0, 0.999, 0.5], true_cfg_scale=1.0, output_type="latent")
    assert spy.kept() == [4, 8, 16]


def test_three_branches_are_refused(sd3, monkeypatch):
    pipe, _ = sd3
    monkeypatch.setattr(type(pipe), "do_perturbed_attention_guidance", True, raising=False)
    with elit.budget(8, guidance=1), pytest.raises(ValueError, match="perturbs attention in another branch"):
        draw_alike(pipe)


@pytest.mark.parametrize(
    "name", ["FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxKontextPipeline (edit)", "ChromaPipeline"]
)
def test_branches_that_a_pipeline_does_not_label_have_their_budgets(name, monkeypatch):
    pipe = elit.elastify(STOCK[name].make(), **SPLIT)
    spy = Spy(pipe.transformer, monkeypatch)
    with elit.budget(8, guidance=1):
        STOCK[name].run(pipe)
    kept = spy.kept()
    assert kept == [8, 1] * max(2, len(kept) // 2)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (16, "a lower budget changes nothing"),
        (2, "ran at [2, 2], not at 4"),
        (4, "ran at [4, 4], not once a step at 1 and else at 8"),
    ],
)
def test_the_table_of_pipelines_counts_what_ran(wrong, reason, monkeypatch):
    """A row fails where the budget is ignored, another, or the same in both branches; else it says what ran."""

    def row():
        return table.tried("dit", stock.make, lambda: elit.elastify(stock.make(), **SPLIT), stock.run, True, 2, 0)

    stock = STOCK["DiTPipeline"]
    assert row()[1:4] == ("works", "2 × 4", "8, 1, 8, 1")
    ignoring = lambda *_: ([16 if current_block.get() is None else wrong], None)  # noqa: E731
    monkeypatch.setattr("elit.elastic.surgery.budgets_of_call", ignoring)
    assert row()[1::4] == ("FAILS", f"Wrong: {reason}")
