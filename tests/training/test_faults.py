"""Faults injected one by one into a training run, and what each of them comes to."""

import json
import os
import re
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock
from PIL import Image
from test_loop import equal, losses, tiny, weights
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from elit.cli.main import main
from elit.config import ModelConfig, RunConfig, save_config
from elit.data.builtin import digits
from elit.data.encode import FEATURES
from elit.data.images import ImageSet
from elit.data.loader import Feed, StepSampler
from elit.training.checkpoint import CheckpointWriter
from elit.training.train import train

pytestmark = pytest.mark.slow


@pytest.fixture
def poisoned(monkeypatch):
    images = digits().images[:100].clone()
    images[7] = torch.nan
    poisoned = ImageSet(images, digits().labels[:100], digits().classes)
    monkeypatch.setattr("elit.training.train.named_images", lambda name: poisoned)
    return 7


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_batch_with_nan_is_left_out_and_named(tmp_path, poisoned, capfd):
    steps = 100 // 16 + 1  # one epoch: the bad image comes once
    train(tiny(tmp_path / "run", steps=steps, batch_size=16, log_every=10))
    (bad,) = rows(tmp_path / "run" / "skipped.jsonl")
    assert (poisoned in bad["samples"], len(bad["samples"]), bad["loss"]) == (True, 16, None)
    metrics = rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in metrics if row["loss"] is None] == [bad["step"]]
    assert metrics[-1]["skipped"] == 1
    assert "1 skipped" in capfd.readouterr().err
    assert all(weight.isfinite().all() for weight in weights(tmp_path / "run").values())


def test_too_many_of_them_stop_the_run(tmp_path, monkeypatch, capfd):
    train(tiny(tmp_path / "run", steps=3))
    monkeypatch.setattr("elit.training.task.flow_matching_loss", lambda v, x0, x1: v.flatten(1).mean(1) * torch.nan)
    message = r"not finite in 4 steps, the last of them 7 \(max_skipped=3\).*skipped\.jsonl.*last good.*step-00000003"
    save_config(tiny(tmp_path / "run", steps=20, log_every=1, max_skipped=3, resume=True), tmp_path / "config.yaml")
    assert main(["train", "--config", str(tmp_path / "config.yaml")]) == 1
    assert re.match(f"elit train: loss or gradient {message}", capfd.readouterr().err.splitlines()[-1])
    assert [row["step"] for row in rows(tmp_path / "run" / "skipped.jsonl")] == [4, 5, 6, 7]
    with pytest.raises(FloatingPointError, match="not finite in 3 steps"):  # not one finite gradient: no model
        train(tiny(tmp_path / "nothing", steps=3))
    assert not (tmp_path / "nothing" / "model").exists()


@pytest.mark.parametrize("label", [2, -1])
def test_a_label_out_of_range_is_named(tmp_path, label):
    settings = {"classes": ["a", "b"], "caption_texts": ["a", "b"], "shape": [4, 8, 8]}
    settings["autoencoder"] = {"scaling_factor": 1.0, "shift_factor": 0.0}
    (tmp_path / "encode.json").write_text(json.dumps(settings))
    (tmp_path / "index.json").write_text(json.dumps({"shards": [{"file": "data.arrow", "rows": 6}]}))
    with ArrowWriter(features=FEATURES, path=str(tmp_path / "data.arrow")) as writer:
        for row in range(6):
            writer.write({"row": row, "label": label if row == 5 else 1, "mean": bytes(512), "std": bytes(512)})
        writer.finalize()
    with pytest.raises(ValueError, match=rf"data: '.*data\.arrow' has label {label} in row 5; .* 0 to 1"):
        train(tiny(tmp_path / "run", data=str(tmp_path)))
    assert not (tmp_path / "run").exists()


def test_a_torn_line_of_metrics_and_a_checkpoint_with_one_wrong_byte_stop_no_run(tmp_path, capfd):
    """The run goes on from the checkpoint before, to the same numbers."""
    out, settings = tmp_path / "run", {"steps": 9, "checkpoint_every": 3}
    train(tiny(tmp_path / "whole", **settings))
    train(tiny(out, **settings | {"steps": 6}))
    newest = out / "checkpoints" / "step-00000006" / "__0_0.distcp"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    half = out / "checkpoints" / ".step-00000008.tmp"
    half.mkdir()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    capfd.readouterr()
    train(tiny(out, **settings, resume=True))
    said = capfd.readouterr().err
    assert re.search(r"ignored: cannot read .*step-00000006': its __0_0.distcp is missing or damaged", said)
    assert ("ignored and removed:" in said, half.exists()) == (True, False)
    assert losses(out) == losses(tmp_path / "whole")
    assert equal(weights(out), weights(tmp_path / "whole"))


def test_where_no_checkpoint_is_whole_the_newest_is_named(tmp_path):
    out = tmp_path / "run"
    train(tiny(out, steps=2))
    for name in ("__0_0.distcp", "checkpoint.json", ".metadata", "config.json"):
        file = out / "checkpoints" / "step-00000002" / name
        content = file.read_bytes()
        file.write_bytes(b"cut")
        with pytest.raises(ValueError, match=rf"cannot read '.*step-00000002': its {name} is missing or damaged"):
            train(tiny(out, resume=True, steps=8))
        file.write_bytes(content)


def pictures(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(root / name)


def test_a_resumed_run_knows_its_data(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    pictures(Path("data"), "a/0.png", "a/1.png", "b/0.png")
    Path("data/[red] boat.txt").write_text("")
    settings = {"image_size": 8, "workers": 1}
    train(tiny(Path("run"), data="data", steps=1, **settings))
    assert "not taken: 1 .txt files, '[red] boat.txt' for one" in capfd.readouterr().err
    train(tiny(Path("run"), data="./data", steps=2, resume=True, **settings))
    assert "samples" not in capfd.readouterr().err
    pictures(Path("data"), "b/1.png", "b/2.png")
    train(tiny(Path("run"), data=str(tmp_path / "data"), steps=3, resume=True, **settings))
    assert "changed: the data, 3 → 5 samples, in another order" in capfd.readouterr().err
    Path("data/a").rename("data/c")
    with pytest.raises(ValueError, match="resume: the classes of the data cannot change within a run"):
        train(tiny(Path("run"), data="data", steps=4, resume=True, **settings))


def test_the_environment_scales_no_loss(tmp_path, monkeypatch):
    train(tiny(tmp_path / "a", steps=2))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    train(tiny(tmp_path / "b", steps=2))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(line, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_too_small_is_found_at_the_start(small_disk):
    with pytest.raises(ValueError, match=r"out='.*run': 0\.00 GiB free, 1\.\d\d wanted for 3 more checkpoints"):
        train(tiny(small_disk / "run", model=ModelConfig(name="DiT-S/2")))


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_whole(small_disk, capfd, monkeypatch):
    out, line = small_disk / "run", ["train", "--config", str(small_disk / "config.yaml")]
    save_config(tiny(out, steps=4, checkpoint_every=2, log_every=1), small_disk / "config.yaml")
    save = CheckpointWriter.save

    def fill_then_save(self, step):
        if step == 4:
            free = shutil.disk_usage(small_disk).free
            (small_disk / "other").write_bytes(b"x" * (free - 50_000))
        save(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "save", fill_then_save)
        assert main(line) == 1
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("elit train: checkpoint of step 4: cannot be written")
    assert re.search("No space left on device.*last good checkpoint: .*step-00000002", said)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000002"]
    (small_disk / "other").unlink()
    assert main([*line, "--resume"]) == 0
    assert len(losses(out)) == 4


def test_what_is_refused_before_the_first_step_leaves_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match=r"cannot write out='.*file/run': Not a directory"):
        train(tiny(tmp_path / "file" / "run"))
    for out in (tmp_path / "new" / "run", tmp_path / "mine"):
        with pytest.raises(ValueError, match="init must be a folder that save_pretrained wrote, got 'nowhere'"):
            train(tiny(out, init="nowhere"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]


def test_two_runs_in_one_folder(tmp_path):
    out = tmp_path / "run"
    (out / "logs").mkdir(parents=True)
    with FileLock(out / "logs" / ".lock"), pytest.raises(ValueError, match=r"out='.*run': another run is writing"):
        train(tiny(out))
    train(tiny(out))
    with FileLock(out / "logs" / ".lock", timeout=0):  # and given back
        pass


class Deadly:
    def __init__(self, flag: Path | None):
        self.flag, self.main = flag, os.getpid()

    def __getitems__(self, indices):
        if 5 in indices and os.getpid() != self.main and not (self.flag and self.flag.exists()):
            if self.flag:
                self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor(indices).float(), torch.tensor(indices)

    def __len__(self):
        return 12


def test_a_dead_loader_process_is_replaced_and_some_that_keep_dying_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.3,))  # looks more often
    sampler = partial(StepSampler, 12, RunConfig(batch_size=4, gradient_accumulation=2, steps=6))
    said: list[str] = []
    feed = Feed(Deadly(tmp_path / "flag"), sampler(), 2, torch.device("cpu"), said.append)
    assert [next(feed)[1].tolist() for _ in range(12)] == list(sampler())
    (line,) = said
    assert "started a new loader at the same batch" in line
    assert feed.waited > 0
    feed = Feed(Deadly(None), sampler(), 1, torch.device("cpu"), said.append)
    with pytest.raises(ChildProcessError, match=r"loader processes died 3 times in a row.*give fewer workers"):
        [next(feed) for _ in range(12)]


def test_a_tracker_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("elit.training.distributed.find_spec", lambda name: None if name == "trackio" else name)
    with pytest.raises(ValueError, match="trackers='trackio': not installed; pip install trackio"):
        train(tiny(tmp_path / "run", trackers=("tensorboard", "trackio")))
    assert not (tmp_path / "run").exists()
