"""elit distill --data on stock pipelines of tiny random parts."""

import json
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image
from tiny import with_text

import elit
from elit.cli.main import main
from elit.config import DistillConfig
from elit.data.reader import centre_crop, read_frames
from elit.elastic.distill import Prediction, distill
from elit.elastic.families import FAMILIES
from elit.elastic.pipelines import CallBatch
from elit.sampling.autoencoders import encode_mean

sys.path.insert(0, str(Path(__file__).parents[2] / "studies" / "pipelines"))
from parts import PIPELINES
from prompts import with_prompts

pytestmark = pytest.mark.slow

NAMES = ["a boat", "a tree", "a cat"]
CALLS = {
    "QwenImagePipeline": ("true_cfg_scale=3.0", "negative_prompt=none"),
    "FluxPipeline": ("max_sequence_length=5",),
    "StableDiffusion3Pipeline": ("guidance_scale=3.0", "negative_prompt=none"),
    "ZImagePipeline": ("guidance_scale=3.0", "negative_prompt=none"),
    "DiTPipeline": (),
}


def made(name):
    return with_prompts(PIPELINES[name].make()) if name == "ZImagePipeline" else with_text(name)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Wide and square pictures with captions."""
    monkeypatch.setattr(
        "elit.elastic.distill.load_pipeline", lambda config, device: made(config.pipeline.removeprefix("tiny/"))
    )
    lines = []
    for number in range(6):
        height, width = (40, 40) if number % 2 else (30, 64)
        path = tmp_path / "pictures" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
        lines.append(json.dumps({"file_name": path.name, "text": NAMES[number % 3]}))
    (tmp_path / "pictures" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "pictures"


def settings(out, name, data, **changes):
    sizes = () if name == "DiTPipeline" else ("32x32", "32x64")
    given = {"pipeline": f"tiny/{name}", "data": str(data), "sizes": sizes, "call": CALLS[name], "window": (2, 2)}
    given |= {"steps": 2, "batch_size": 2, "teacher_steps": 2, "teacher_batch": 2, "preview_every": 2, "lora_rank": 2}
    given |= {"read_after": 1, "write_after": 2, "preview_prompts": 1, "trackers": (), "learning_rate": 1e-2}
    return DistillConfig(out=str(out), **given | {"warmup_steps": 1, "prompt_dropout": 0.25} | changes)


@pytest.mark.parametrize("name", CALLS)
def test_pictures_train_a_dial(tmp_path, folder, name, capsys):
    if name == "DiTPipeline":
        for number, label in enumerate(("7", "8")):
            (folder / label).mkdir()
            (folder / f"{number}.png").rename(folder / label / "0.png")
    config = settings(tmp_path / "out", name, folder)
    result = distill(config)
    buckets = 1 if name == "DiTPipeline" else 2
    assert f"examples in {buckets} buckets" in capsys.readouterr().err
    distances = [row["distance"] for row in result["validation"]]
    assert distances[0] < 1e-4 < distances[-1]
    assert (tmp_path / "out" / "samples" / "step-00000002.png").is_file()
    elit.load_elastic(made(name), tmp_path / "out")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_weights_learn_from_a_copy_that_stays(tmp_path, folder, precision):
    distill(settings(tmp_path / "out", "QwenImagePipeline", folder, weights="all", precision=precision))
    pipe = made("QwenImagePipeline")
    before = pipe.transformer.proj_out.weight.clone()
    elit.load_elastic(pipe, tmp_path / "out")
    assert not torch.equal(pipe.transformer.proj_out.weight, before)


def test_samples_are_noised_as_the_schedulers_do():
    """x_t, the time that a class is told, and the target, against diffusers' own schedulers."""
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 3, 4, 4, 4, generator=generator).unbind()
    t = torch.tensor([0.25, 0.7, 0.9])
    euler = diffusers.FlowMatchEulerDiscreteScheduler()
    euler.set_timesteps(sigmas=(1 - t).tolist())
    for kind, time, sign in (
        ("FluxTransformer2DModel", 1 - t, 1),
        ("StableDiffusion3Transformer", 1000 * (1 - t), 1),
        ("ZImageTransformer2DModel", t, -1),
        ("Lumina2Transformer2DModel", t, -1),
    ):
        family = FAMILIES.get(kind, FAMILIES["SD3Transformer2DModel"])
        name = "t" if kind.startswith("Z") else "timestep"
        arguments, target = Prediction(euler, family).call(x, noise, t, CallBatch({name: torch.zeros(3)}))
        sample = arguments[family.sample]
        noisy = torch.stack(sample) if family.listed else sample
        assert torch.allclose(noisy, euler.scale_noise(x, euler.timesteps, noise), atol=1e-6)
        assert torch.allclose(arguments[name], time)
        assert torch.allclose(target, sign * (noise - x))
    for prediction in ("epsilon", "v_prediction"):
        ddim = diffusers.DDIMScheduler(prediction_type=prediction)
        start = CallBatch({"timestep": torch.zeros(3, dtype=torch.long)})
        arguments, target = Prediction(ddim, FAMILIES["DiTTransformer2DModel"]).call(x, noise, t, start)
        steps = arguments["timestep"]
        assert steps.tolist() == [750, 300, 100]
        assert torch.allclose(arguments["hidden_states"], ddim.add_noise(x, noise, steps), atol=1e-6)
        right = noise if prediction == "epsilon" else ddim.get_velocity(x, noise, steps)
        assert torch.allclose(target, right, atol=1e-6)


def test_latents_are_packed_and_normalized_as_the_pipeline_does(folder):
    """Against what FluxImg2ImgPipeline makes of a picture."""
    pipe = PIPELINES["FluxImg2ImgPipeline"].make()
    pixels = centre_crop(read_frames((folder / "1.png").read_bytes())[0], 32)[None]
    encoded = pipe._encode_vae_image(pixels, [torch.Generator()])
    packed = pipe._pack_latents(encoded, 1, 4, 8, 8)
    mean = encode_mean(pipe.vae, pixels)
    posterior = pipe.vae.encode(pixels).latent_dist
    noise = (encoded / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor - posterior.mean) / posterior.std
    ours = mean + noise * posterior.std * pipe.vae.config.scaling_factor
    assert torch.allclose(FAMILIES["FluxTransformer2DModel"].pack(ours), packed, atol=1e-4)


def test_wrong_calls_are_one_line(tmp_path, folder, capsys, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a boat\n")
    (tmp_path / "empty").mkdir()
    good, out = ["--data", str(folder)], str(tmp_path / "out")
    flux = ["tiny/FluxPipeline", out, "--sizes", "32x32"]
    for words, message in (
        ([*flux, *good, "--prompts", str(tmp_path / "prompts.txt")], "cannot learn from prompts and data at once"),
        ([*flux, "--data", "nowhere"], "cannot read 'nowhere': must be a folder"),
        ([*flux, "--data", str(tmp_path / "empty")], "no pictures in its sub-folders"),
        (["tiny/LTX2Pipeline", out, *good], "data is not supported for a LTX2Pipeline"),
        (["tiny/DiTPipeline", out, *good], "no pictures in its sub-folders"),
        ([*flux[:2], "--sizes", "0x8", *good], "sizes must be HEIGHTxWIDTH in pixels"),
        ([*flux, *good, "--time-shift", "0"], "time_shift must be above 0, got 0.0"),
        ([*flux, *good, "--prompt-dropout", "1"], "prompt_dropout must be"),
    ):
        monkeypatch.setattr(
            "elit.elastic.distill.load_pipeline",
            lambda config, device: (
                PIPELINES[config.pipeline.removeprefix("tiny/")].make()
                if "LTX" in config.pipeline
                else made(config.pipeline.removeprefix("tiny/"))
            ),
        )
        assert main(["distill", *words]) == 2, words
        error = capsys.readouterr().err.strip().splitlines()
        assert message in error[-1], error
        assert error[-1].startswith("elit distill: ")
