"""A pipeline whose own call takes the budget: loaded by elit, or by diffusers alone from the folder that was saved."""

import inspect
import subprocess
import sys

import diffusers
import pytest
import torch
from tiny import elastic_pipeline

import elit

CALL = {"class_labels": [1], "num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"}


def picture(pipe, **budgets):
    return torch.from_numpy(pipe(**CALL, generator=torch.Generator().manual_seed(0), **budgets).images)


@pytest.fixture(scope="module", params=[False, True], ids=["", "trained"])
def saved(request, tmp_path_factory):
    """Folder, and pictures at full budget, at 4 latents, and at 4 with 1 in the other branch."""
    folder = tmp_path_factory.mktemp("dial")
    pipe = elastic_pipeline("DiTPipeline", opened=True)
    if request.param:  # weights that are no model alone
        with torch.no_grad():
            pipe.transformer.transformer_blocks[1].attn1.to_q.weight.mul_(1.01)
    pipe.save_pretrained(folder)
    pictures = [picture(pipe)]
    for guidance in ({}, {"guidance": 1}):
        with elit.budget(4, **guidance):
            pictures.append(picture(pipe))
    return folder, {"variant": "elastic"} if request.param else {}, pictures


def check(pipe, pictures):
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(picture(pipe), pictures[0])
    assert torch.equal(picture(pipe, budget=0.25), pictures[1])
    assert torch.equal(picture(pipe, budget=4, guidance_budget=1), pictures[2])
    with elit.budget(4):
        assert torch.equal(picture(pipe), pictures[1])
    assert {"class_labels", "budget", "guidance_budget"} <= set(inspect.signature(pipe.__call__).parameters)
    with pytest.raises(ValueError, match="budget"):
        picture(pipe, budget=99)


def test_loaded_by_diffusers_with_the_file_in_the_folder(saved, tmp_path):
    folder, more, pictures = saved
    for name in ("pipeline", str(folder / "pipeline.py")):
        options = {"custom_pipeline": name, "trust_remote_code": True, **more}
        pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder), **options)
        check(pipe, pictures)
    pipe.save_pretrained(tmp_path)  # and again
    assert (tmp_path / "pipeline.py").read_text() == (folder / "pipeline.py").read_text()
    for each in (folder, tmp_path):
        pipe = elit.load_elastic(each)
        assert isinstance(pipe, diffusers.DiTPipeline)
        check(pipe, pictures)


@pytest.mark.slow
@pytest.mark.parametrize("saved", [False], indirect=True)
def test_in_a_process_that_never_imports_elit(saved):
    folder, more, pictures = saved
    code = f"""
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(folder)!r}, custom_pipeline="pipeline", trust_remote_code=True, **{more})
image = pipe(**{CALL}, generator=torch.Generator().manual_seed(0), budget=0.25).images
print(float(image.sum()))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert float(done.stdout) == pytest.approx(float(pictures[1].numpy().sum()), rel=1e-5)
