"""elit distill by two gloo processes: the loop of `elit train`, so the same promises."""

import json

import pytest
import torch
from commands import run_two
from PIL import Image
from safetensors.torch import load_file
from tiny import pipeline

from elit.config import DistillConfig, save_config
from elit.elastic.distill import distill

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline of classes as it is saved, prompts and pictures for it."""
    root = tmp_path_factory.mktemp("pipeline")
    pipeline("DiTPipeline").save_pretrained(root / "dit")
    (root / "prompts.txt").write_text("7\n8\n9\n10\n")
    for label in ("7", "8"):
        (root / "pictures" / label).mkdir(parents=True)
        for number in range(3):
            pixels = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(number))
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(root / "pictures" / label / f"{number}.png")
    return root


def settings(folder, out, *, pictures, **changes):
    source = {"data": str(folder / "pictures")} if pictures else {"prompts": str(folder / "prompts.txt")}
    given = {"pipeline": str(folder / "dit"), "window": (4, 4), "steps": 8, "batch_size": 4, "teacher_steps": 2}
    given |= {"teacher_batch": 2, "preview_every": 0, "checkpoint_every": 2, "log_every": 1, "trackers": ()}
    given |= {"lora_rank": 2, "call": ("guidance_scale=1.0",), "learning_rate": 3e-3, "warmup_steps": 1}
    return DistillConfig(out=str(out), **source, **given | {"gradient_accumulation": 2} | changes)


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("sharded", [False, True], ids=["copied, trajectories", "sharded, pictures"])
def test_two_processes_match_one(folder, tmp_path, sharded):
    """Same global batch, same losses and weights; DDP and FSDP2."""
    reference, out = tmp_path / "one", tmp_path / "run"
    distill(settings(folder, reference, pictures=sharded))
    save_config(settings(folder, out, pictures=sharded, fsdp=sharded), tmp_path / "config.yaml")
    run_two(["distill", "--config", str(tmp_path / "config.yaml")], tmp_path)
    assert losses(out) == pytest.approx(losses(reference), abs=1e-4)
    one, two = (load_file(each / "elastic.safetensors") for each in (reference, out))
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-4
