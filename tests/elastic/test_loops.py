"""Things that a budget is bound to: the scheduler's timesteps, the branch that runs, a transformer with a dial."""

from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch
from tiny import SPLIT, Spy, build, draw, elastic_pipeline, inputs, pipeline, window

import elit


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
    """By a cache context, the guider of diffusers' modular blocks, or `doubled`; refused where nobody does."""
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
