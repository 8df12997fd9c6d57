"""elit distill on the stock pipelines of the classes that came later: train, validate, save, load, sample."""

import sys
from pathlib import Path

import pytest
import torch

import elit
from elit.config import DistillConfig
from elit.elastic.distill import distill
from elit.elastic.pipelines import Requests

sys.path.insert(0, str(Path(__file__).parents[2] / "studies" / "pipelines"))
from parts import PIPELINES
from prompts import with_prompts

pytestmark = pytest.mark.slow

VIDEO = ("num_frames=5", "guidance_scale=3.0", "negative_prompt=none")
CALLS = {
    "Flux2KleinPipeline": ("guidance_scale=3.0",),
    "ChromaPipeline": ("guidance_scale=3.0", "negative_prompt=none"),
    "QwenImage21Pipeline": ("true_cfg_scale=3.0", "negative_prompt=none"),
    "ZImagePipeline": ("guidance_scale=3.0", "negative_prompt=none"),
    "Lumina2Pipeline": ("guidance_scale=3.0", "negative_prompt=none"),
    "PixArtAlphaPipeline": ("guidance_scale=3.0", "negative_prompt=none", "use_resolution_binning=False"),
    "WanPipeline": VIDEO,
    "WanVACEPipeline": VIDEO,
    "CogVideoXPipeline": VIDEO,
    "LTX2Pipeline": VIDEO,
    "HunyuanVideo15Pipeline": ("num_frames=5", "negative_prompt=none"),
}


def made(name):
    return with_prompts(PIPELINES[name].make())


@pytest.mark.parametrize("name", CALLS)
def test_two_steps_a_picture_and_three_budgets_in_a_fresh_pipeline(tmp_path, monkeypatch, name):
    monkeypatch.setattr(
        "elit.elastic.distill.load_pipeline", lambda config, device: made(config.pipeline.removeprefix("tiny/"))
    )
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a boat\na tree\n")
    size = "32x32" if name == "LTX2Pipeline" else "64x64"
    given = {"pipeline": f"tiny/{name}", "prompts": str(prompts), "sizes": (size,), "call": CALLS[name], "trackers": ()}
    given |= {"steps": 2, "batch_size": 2, "teacher_steps": 2, "teacher_batch": 2, "preview_every": 2, "lora_rank": 2}
    given |= {"read_after": 1, "write_after": 3, "preview_prompts": 1, "learning_rate": 1e-2, "warmup_steps": 1}
    if name == "WanVACEPipeline":
        given["teacher_batch"] = 1
    if any(each.startswith("num_frames") for each in CALLS[name]):
        given["teacher_steps"] = 1  # clips take a while
    config = DistillConfig(out=str(tmp_path / "out"), **given)
    result = distill(config)
    distances = [row["distance"] for row in result["validation"]]
    assert distances[0] < 1e-4 < distances[-1]  # at full budget the original runs
    assert (tmp_path / "out" / "samples" / "step-00000002.png").is_file()

    pipe = made(name)
    request = Requests(pipe, config, ["a boat"]).validation(output_type="latent")

    def drawn():
        output = pipe(**request | {"generator": torch.Generator().manual_seed(0)})
        return output.images if hasattr(output, "images") else output.frames

    right = drawn()
    elit.load_elastic(pipe, tmp_path / "out")
    for budget in (None, 0.5, 0.25):
        with elit.budget(budget):
            samples = drawn()
        assert samples.isfinite().all()
        assert torch.equal(samples, right) == (budget is None)
