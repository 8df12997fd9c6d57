"""ElitPipeline as a diffusers pipeline."""

import pytest
import torch
from conftest import opened, small_vae, small_video_vae
from diffusers import (
    AutoencoderKLCogVideoX,
    DEISMultistepScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

import elit
from elit.sampling.autoencoders import load_autoencoder
from elit.sampling.engine import NetworkEngine
from elit.sampling.pipeline import ElitPipeline
from elit.sampling.sample import sample, seeded_noise


def pipeline(vae=None, kind="elit-dit", **components) -> ElitPipeline:
    pipe = ElitPipeline(opened(kind), FlowMatchEulerDiscreteScheduler(), vae, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("call", "guidance"),
    [
        ({"budget": "4@0-0.5,16@0.5-1"}, None),
        ({"budget": 8, "guidance_scale": 2.0}, elit.CFG(2.0)),
        ({"guidance_scale": 2.0, "guidance_budget": 1}, elit.CCFG(2.0, 1)),
        ({"cache": 2.5}, None),
        ({"dtype": torch.bfloat16}, None),
    ],
)
def test_matches_sample_on_the_same_noise(call, guidance):
    pipe, noise = pipeline(), seeded_noise([3, 4], (4, 16, 16))
    out = pipe([0, 1], num_inference_steps=6, latents=noise, output_type="latent", **call).images
    settings = {name: value for name, value in call.items() if not name.startswith("guidance")}
    expected = sample(pipe.transformer, [0, 1], steps=6, noise=noise, guidance=guidance, **settings)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4 if "dtype" in call else 1e-5)


def test_a_shifted_scheduler_is_a_shifted_grid_and_generators_are_seeds():
    pipe = pipeline()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    out = pipe([0, 1], num_inference_steps=5, generator=generators, output_type="latent").images
    assert torch.allclose(out, sample(pipe.transformer, [0, 1], steps=5, shift=2.0, seed=3), atol=1e-5)


def test_output_types():
    pipe = pipeline(small_vae())
    out = {kind: pipe([0, 1], num_inference_steps=1, output_type=kind).images for kind in ("pil", "np", "pt", "latent")}
    assert [image.size for image in out["pil"]] == [(32, 32)] * 2
    assert out["np"].shape == (2, 32, 32, 3)
    assert 0 <= out["np"].min() <= out["np"].max() <= 1
    assert out["pt"].shape == (2, 3, 32, 32)
    assert out["latent"].shape == (2, 4, 16, 16)
    assert isinstance(pipe(0, num_inference_steps=1, return_dict=False), tuple)


def test_clips_with_a_video_autoencoder(tmp_path):
    pipe = pipeline(small_video_vae(), kind="elit-dit-video")
    call = {"num_inference_steps": 1, "budget": 2}
    out = {kind: pipe([0, 1], output_type=kind, **call).images for kind in ("pil", "np", "pt")}
    frames = 8
    assert [len(clip) for clip in out["pil"]] == [frames] * 2
    assert out["np"].shape == (2, frames, 64, 64, 3)
    assert out["pt"].shape == (2, frames, 3, 64, 64)
    pipe.save_pretrained(tmp_path)
    assert isinstance(load_autoencoder(tmp_path / "vae", required=True), AutoencoderKLCogVideoX)


@pytest.mark.parametrize("kind", ["elit-uvit", "elit-hdit", "elit-dit-video", "elit-mmdit"])
def test_every_backbone_matches_sample_through_a_saved_folder(kind, tmp_path):
    pipeline(kind=kind).save_pretrained(tmp_path)
    pipe = ElitPipeline.from_pretrained(tmp_path)
    model = pipe.transformer
    noise = seeded_noise([3, 4], (4, *model.sample_size))
    wanted = ["a one", "a six"] if kind == "elit-mmdit" else [0, 1]
    name = "prompt" if kind == "elit-mmdit" else "class_labels"
    call = {"num_inference_steps": 3, "latents": noise, "output_type": "latent", "guidance_scale": 2.0}
    out = pipe(**{name: wanted}, guidance_budget=model.budgets[0], **call).images
    guidance = elit.CCFG(2.0, model.budgets[0])
    assert torch.allclose(out, sample(model, wanted, steps=3, noise=noise, guidance=guidance), atol=1e-5)


def test_text_to_image_with_an_encoder_saves_and_loads(tmp_path):
    from models.test_mmdit import PROMPTS, save_encoder

    folder = save_encoder("bert", tmp_path / "bert")
    encoder = elit.TextEncoder(folder, length=8)
    settings = {"text_encoder": folder, "text_features": 16, "pooled_features": 16, "text_length": 8, "in_channels": 3}
    sizes = {"sample_size": 16, "hidden_size": 48, "num_heads": 4, "depth": 4}
    model = elit.create_model("ELIT-MM-DiT-S/2", **sizes, **settings)
    torch.nn.init.normal_(model.final.linear.weight)
    parts = {"text_encoder": encoder.model, "tokenizer": encoder.tokenizer}
    ElitPipeline(model, FlowMatchEulerDiscreteScheduler(), **parts).save_pretrained(tmp_path / "pipe")
    pipe = ElitPipeline.from_pretrained(tmp_path / "pipe")
    noise = seeded_noise([0, 1], (3, 16, 16))
    call = {"num_inference_steps": 2, "latents": noise, "output_type": "latent"}
    by_prompt = pipe(prompt=PROMPTS[:2], **call).images
    assert torch.allclose(by_prompt, sample(model.eval(), encoder(PROMPTS[:2]), steps=2, noise=noise), atol=1e-5)
    assert torch.allclose(by_prompt, pipe(prompt_embeds=encoder(PROMPTS[:2]), **call).images, atol=1e-5)
    assert pipe(prompt="a red boat", num_inference_steps=1).images[0].size == (16, 16)


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize(
    "scheduler",
    [
        UniPCMultistepScheduler(**FLOW, flow_shift=2.0),
        DPMSolverMultistepScheduler(**FLOW),
        DEISMultistepScheduler(**FLOW),
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedulers_of_flows_reach_what_many_steps_of_euler_do(scheduler):
    pipe, noise = pipeline(), seeded_noise([0], (4, 16, 16))
    pipe.scheduler = scheduler
    made = pipe(0, num_inference_steps=50, latents=noise, output_type="latent", budget=0.5).images
    exact = sample(pipe.transformer, [0], steps=100, noise=noise, budget=0.5)
    assert (made - exact).square().mean() < 0.2**2 * (exact - noise).square().mean()


@pytest.mark.parametrize(
    "scheduler",
    [
        EulerDiscreteScheduler(),
        FlowMatchHeunDiscreteScheduler(),
        UniPCMultistepScheduler(),
        DPMSolverMultistepInverseScheduler(**FLOW),
        FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_other_schedulers_are_refused_in_a_line(scheduler):
    message = f"scheduler must be FlowMatchEuler.*, or one .*, got '{type(scheduler).__name__}'$"
    with pytest.raises(ValueError, match=message):
        ElitPipeline(opened("elit-dit"), scheduler)
    pipe = pipeline()
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        pipe(0, num_inference_steps=2)


def test_noise_levels_may_be_given():
    pipe, noise = pipeline(), seeded_noise([0], (4, 16, 16))
    call = {"latents": noise, "output_type": "latent"}
    made = pipe(0, sigmas=[1.0, 0.9, 0.3], budget=0.5, **call).images
    engine = NetworkEngine(pipe.transformer)
    run = engine.begin(torch.tensor([0]), (), elit.Sampling(steps=3, budget=0.5), noise=noise, times=[0, 0.1, 0.7, 1])
    while not run.done:
        run.step()
    assert torch.allclose(made, run.x, atol=1e-5)
    even = pipe(0, sigmas=[1.0, 0.75, 0.5, 0.25], **call).images
    assert torch.equal(even, pipe(0, num_inference_steps=4, **call).images)


@pytest.mark.parametrize(("start", "then"), [(3.0, 1.0), (1.0, 3.0), (3.0, 2.0)])
@pytest.mark.parametrize("weak", [{}, {"guidance_budget": 1}])
def test_a_callback_changes_the_guidance_scale(start, then, weak):
    pipe, noise = pipeline(), seeded_noise([0], (4, 16, 16))
    call = {"class_labels": 0, "output_type": "latent", **weak}

    def change(pipe, step, timestep, told):
        pipe._guidance_scale = then
        return told

    made = pipe(**call, num_inference_steps=2, latents=noise, guidance_scale=start, callback_on_step_end=change).images
    assert pipe.guidance_scale == then
    velocities = [  # at t = 0 and at 1/2: guided at the first scale, then at the other
        lambda x, t, scale=scale: (
            (scale * pipe.transformer(x, t, torch.tensor([0])))
            - (scale - 1) * pipe.transformer(x, t, torch.tensor([5]), weak.get("guidance_budget"))
        )
        for scale in (start, then)
    ]
    half = noise + 0.5 * velocities[0](noise, torch.tensor([0.0]))
    assert torch.allclose(made, half + 0.5 * velocities[1](half, torch.tensor([0.5])), atol=1e-4)


def test_height_and_width_are_pixels_of_the_picture_and_a_label_has_several_images():
    pipe = pipeline(small_vae())  # two pixels a cell
    call = {"num_inference_steps": 1, "latents": seeded_noise(range(4), (4, 16, 16)), "output_type": "latent"}
    by_number = pipe([0, 3], num_images_per_prompt=2, **call).images
    assert torch.equal(by_number, pipe([0, 0, 3, 3], **call).images)
    images = pipe(0, num_inference_steps=1, height=48, width=64, output_type="pil").images
    assert images[0].size == (64, 48)
    start = {"num_inference_steps": 1, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    assert pipe(0, width=64, **start).images.shape == (1, 4, 16, 32)
    expected = sample(pipe.transformer, 0, steps=1, sample_size=(16, 32))
    start["generator"].manual_seed(0)
    assert torch.allclose(pipe(0, height=32, width=64, **start).images, expected, atol=1e-5)


def test_a_callback_sees_every_step_changes_the_state_and_stops_the_run():
    pipe = pipeline()
    noise = seeded_noise([0], (4, 16, 16))
    call = {"num_inference_steps": 5, "latents": noise, "output_type": "latent"}
    seen = []
    whole = pipe(0, callback_on_step_end=lambda *told: seen.append(told[1:]), **call).images
    assert [step for step, *_ in seen] == [0, 1, 2, 3, 4]
    assert pipe.num_timesteps == 5
    assert seen[0][1] > seen[-1][1]
    assert torch.equal(seen[-1][2]["latents"], whole)
    assert torch.equal(whole, pipe(0, **call).images)

    def stop(pipe, step, timestep, told):
        pipe._interrupt = step == 1
        return told

    stopped = pipe(0, callback_on_step_end=stop, **call).images
    assert pipe._interrupt
    assert torch.equal(stopped, seen[1][2]["latents"])
    zeroed = pipe(0, callback_on_step_end=lambda *_: {"latents": torch.zeros(1, 4, 16, 16)}, **call).images
    assert not zeroed.any()
    assert not pipe._interrupt  # each call starts anew
    nothing = pipe(0, callback_on_step_end=lambda *a: seen.append(a[3]), callback_on_step_end_tensor_inputs=[], **call)
    assert seen[-1] == {}
    assert torch.equal(nothing.images, whole)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"class_labels": None}, r"condition must be class_labels for this network, got \[\]"),
        ({"class_labels": None, "prompt": "a one"}, r"condition must be class_labels .*, got \['prompt'\]"),
        ({"class_labels": 6}, "y must be labels 0 to 4, or 5 for no class, got "),
        ({"budget": 17}, "got 17"),
        ({"output_type": "jpeg"}, "output_type must be one of .*, got 'jpeg'"),
        ({"latents": torch.randn(1, 3, 16, 16)}, "latents must be of shape"),
        ({"height": 31}, "height must be a multiple of 2 pixels, got 31"),
        ({"width": 34}, "cannot make pictures of 32×34 pixels, 2 a cell: .*16 or 18"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callback_on_step_end_tensor_inputs must be some of"),
        ({"generator": [torch.Generator()] * 3}, "generators must be 1, or 1, one a sample, got 3"),
        ({"height": 64, "latents": torch.zeros(1, 4, 16, 16)}, "latents must be of shape"),
    ],
)
def test_bad_calls_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        pipeline(small_vae())(**{"class_labels": 0, "num_inference_steps": 1} | call)
    with pytest.raises(ValueError, match="vae must be given for samples of 4 channels"):
        pipeline()(0, num_inference_steps=1)
