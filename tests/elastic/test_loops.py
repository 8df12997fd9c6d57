"""Things that a budget is bound to: the scheduler's timesteps, the branch that runs, a transformer with a dial."""

from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch
from test_pipelines import Spy, elastic_pipeline
from tiny import TEXT, build, draw, inputs, pipeline, window

import elit

SPLIT = {"read_after": 1, "write_after": 3, "window": (4, 4)}


def kept(spy):
    found = [count for count, _ in spy.seen]
    spy.seen.clear()
    return found


def image_to_image(pipe, steps, strength):
    text = {"prompt_embeds": torch.randn(1, TEXT, 20), "pooled_prompt_embeds": torch.randn(1, 10)}
    size = {"height": 64, "width": 64, "num_inference_steps": steps, "strength": strength, "output_type": "latent"}
    pipe(image=torch.rand(1, 3, 64, 64), **text, **size)


def test_image_to_image_takes_the_budgets_of_the_steps_that_it_runs(monkeypatch):
    pipe = diffusers.FluxImg2ImgPipeline.from_pipe(elastic_pipeline("FluxPipeline"))
    pipe.set_progress_bar_config(disable=True)
    spy = Spy(pipe.transformer, monkeypatch)
    with elit.budget(list(range(1, 9))):
        image_to_image(pipe, 8, 0.5)
        image_to_image(pipe, 8, 0.25)  # a second run starts anew
    assert kept(spy) == [5, 6, 7, 8, 7, 8]
    with elit.budget([3, 4]):
        image_to_image(pipe, 4, 0.5)  # one for each step that runs
    assert kept(spy) == [3, 4]
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
    found = kept(spy)
    assert found[: len(found) // 2] == found[len(found) // 2 :]
    assert found[: len(found) // 2] == right
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
    assert kept(spy) == [4, 8, 4, 4, 8]
    with pytest.raises(ValueError, match="got a list of 2 budgets in step 3"), elit.budget([4, 8]):
        loop(0.9, 0.5, 0.2)
    with pytest.raises(ValueError, match="got a list of 2 budgets for 1 steps"), elit.budget([4, 8]):
        loop(0.9)


@pytest.mark.parametrize("kind", ["QwenImageTransformer2DModel", "WanTransformer3DModel", "FluxTransformer2DModel"])
def test_branches_that_nobody_names_are_refused(kind, monkeypatch):
    model = elit.elastify(build(kind), **SPLIT | {"window": window(kind)})
    spy, x = Spy(model, monkeypatch), inputs(kind, batch=1)
    with torch.no_grad():
        for doubled in (None, True):
            with (
                pytest.raises(ValueError, match="doubled must be given where"),
                elit.budget(8, guidance=1, doubled=doubled),
            ):
                model(**x)
        with elit.budget(8, guidance=1):
            for branch in ("cond", "uncond", "pred_cond", "pred_uncond"):
                with model.cache_context(branch):
                    model(**x)
        with elit.budget(8, guidance=1, doubled=False):
            model(**x)
    assert kept(spy) == [8, 1, 8, 1, 8]


@pytest.mark.parametrize(
    "kind", ["CogVideoXTransformer3DModel", "LTX2VideoTransformer3DModel", "Lumina2Transformer2DModel"]
)
def test_a_guiders_names_hold_where_pipelines_have_both_in_a_batch(kind, monkeypatch):
    model = elit.elastify(build(kind), **SPLIT | {"window": window(kind)})
    spy, x = Spy(model, monkeypatch), inputs(kind, batch=1)
    with torch.no_grad(), elit.budget(8, guidance=1):
        for branch in ("pred_cond", "pred_uncond"):
            with model.cache_context(branch):
                model(**x)
    assert kept(spy) == [8, 1]


@pytest.mark.parametrize("kind", ["QwenImageTransformer2DModel", "ZImageTransformer2DModel", "WanTransformer3DModel"])
def test_a_modular_pipelines_guider_says_the_branch(kind, monkeypatch):
    """The loop of diffusers' modular blocks, which set no cache context."""
    model = elit.elastify(build(kind), **SPLIT | {"window": window(kind)})
    spy, x = Spy(model, monkeypatch), inputs(kind, batch=1)
    guider = diffusers.ClassifierFreeGuidance(3.0)
    guider.set_state(step=0, num_inference_steps=2, timestep=torch.tensor(1000))
    with torch.no_grad(), elit.budget(8, guidance=1):
        for guider_state_batch in guider.prepare_inputs({"text": (torch.ones(1), torch.zeros(1))}):
            guider_state_batch.noise_pred = model(**x)
    assert kept(spy) == [8, 1]


def test_a_block_without_effect_is_said():
    x, model = inputs("DiTTransformer2DModel"), elit.elastify(build("DiTTransformer2DModel"), **SPLIT)
    with pytest.warns(UserWarning, match="elit.budget had no effect"), elit.budget(0.5):
        draw(pipeline("DiTPipeline"), steps=1)
    said = "each thread needs a block of its own"
    with pytest.warns(UserWarning, match=said), elit.budget(0.5), ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: model(**x)).result()
    with pytest.raises(RuntimeError, match="mine"), elit.budget(0.5):
        raise RuntimeError("mine")
