"""Averages, scores and checkpoints beside a run's steps; a run with all options on ends in the same bytes if killed."""

import json
import os
import re
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import run_two
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_loop import command, equal, losses, tiny, weights
from torch.distributed import checkpoint as dcp

import elit
from elit.cli.main import main
from elit.config import DistillConfig, save_config
from elit.data.builtin import digits
from elit.data.loader import BucketSampler
from elit.evaluate.detectors import open_detector
from elit.evaluate.during import train
from elit.evaluate.metrics import frechet_distance, moments
from elit.evaluate.pictures import as_samples
from elit.flow import flow_matching_loss, interpolate
from elit.sampling.engine import seeded_noise
from elit.sampling.pictures import to_uint8
from elit.training import checkpoint, loop

pytestmark = pytest.mark.slow

SCORED = {"score_every": 3, "score_samples": 64}
ALL = {"optimizer": "muon", "schedule": "cosine", "gradient_accumulation": 2, "ema_more": (0.5, 0.0), "ema_decay": 0.9}
ALL |= {"async_checkpoints": True, "checkpoint_every": 2, "keep_last": 9, "log_every": 1, "preview_every": 3, **SCORED}


@pytest.fixture(autouse=True)
def _few_solver_steps(monkeypatch):
    monkeypatch.setattr("elit.evaluate.during.Sampling", lambda budget: elit.Sampling(steps=2, budget=budget))


def test_the_validation_loss_is_of_samples_that_no_step_takes(tmp_path, monkeypatch):
    """Against the loss taken by hand, on the digits' first and every fifth."""
    taken = set()
    samples = BucketSampler.samples
    monkeypatch.setattr(BucketSampler, "samples", lambda self, step: taken.update(each := samples(self, step)) or each)
    config = tiny(
        tmp_path, steps=60, batch_size=32, score_every=30, score_samples=0, validation_share=0.2, log_every=60
    )
    model = train(config).eval()
    held_out = [i * 1797 // 359 for i in range(359)]
    assert len(taken) > 1000
    assert not taken & set(held_out)
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [(row["step"], row["budget"]) for row in rows] == [(30, 16), (30, 4), (60, 16), (60, 4)]
    used, expected = held_out[::6], []
    images, y = digits().__getitems__(used)
    noise = seeded_noise(range(len(used)), (1, 8, 8))
    for time in (0.1, 0.3, 0.5, 0.7, 0.9):
        t = torch.full((len(used),), time)
        with torch.no_grad():
            expected.append(flow_matching_loss(model(interpolate(noise, images, t), t, y), noise, images).mean())
    assert rows[2]["validation_loss"] == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
    assert (tmp_path / "scores.png").is_file()


def killed(config, patch) -> None:
    pid = os.fork()
    if not pid:
        patch()
        train(config)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL


def while_writing(step: int):
    def patch() -> None:
        write = checkpoint.write_text

        def last_write(path: Path, text: str) -> None:
            if json.loads(text)["step"] == step:
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, text)

        checkpoint.write_text = last_write

    return patch


def in_step(number: int):
    """Kills before the weights move for the n-th time, once the checkpoint before is there."""

    def patch() -> None:
        steps, clip, save = [0], loop.clip_gradients, checkpoint.CheckpointWriter.save

        def last_clip(*arguments):
            steps[0] += 1
            if steps[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return clip(*arguments)

        def save_whole(self, step: int) -> None:
            save(self, step)
            self.wait()

        loop.clip_gradients, checkpoint.CheckpointWriter.save = last_clip, save_whole

    return patch


def files(out: Path) -> dict[str, bytes]:
    models = [path for folder in out.glob("model*") for path in folder.iterdir()]
    return {str(path.relative_to(out)): path.read_bytes() for path in (*models, out / "scores.jsonl")}


def test_everything_on_and_killed_twice_ends_in_the_same_bytes(tmp_path):
    train(tiny(tmp_path / "whole", **ALL))
    out = tmp_path / "run"
    config = tiny(out, resume=True, **ALL)
    killed(config, while_writing(4))
    assert [path.name for path in (out / "checkpoints").iterdir() if path.name[0] != "."] == ["step-00000002"]
    killed(config, in_step(3))  # the fifth, after the third and fourth once more
    train(config)
    assert losses(out) == losses(tmp_path / "whole")
    assert len(files(out)) == 10
    assert files(out) == files(tmp_path / "whole")


def test_further_averages_are_those_computed_directly(tmp_path):
    config = tiny(tmp_path / "run", ema_decay=0.9, ema_more=(0.2,), checkpoint_every=1, keep_last=9)
    train(config)
    average = None
    for step in range(1, 7):
        now = {name: torch.empty_like(weight) for name, weight in weights(tmp_path / "run").items()}
        dcp.load({"model": now}, checkpoint_id=tmp_path / "run" / "checkpoints" / f"step-{step:08d}", no_dist=True)
        decay = min(0.2, step / (9 + step)) if step > 1 else 0
        average = {name: decay * average[name] + (1 - decay) * now[name] if average else now[name] for name in now}
    saved = elit.load_model(tmp_path / "run" / "model-ema-0.2").state_dict()
    assert all(torch.allclose(saved[name], average[name], atol=1e-6) for name in average)
    assert not equal(saved, weights(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"ema_more must be in \[0, 1\), got 1.5"):
        DistillConfig(ema_more=(0.5, 1.5))
    with pytest.raises(ValueError, match=r"ema_more \(0.2,\) → \(0.9,\) cannot change"):
        train(replace(config, ema_more=(0.9,), resume=True))


def test_scores_are_those_of_the_averaged_weights_and_change_nothing(tmp_path):
    out = tmp_path / "run"
    train(tiny(tmp_path / "without", steps=4))
    train(tiny(out, steps=4, **SCORED))
    assert losses(out) == losses(tmp_path / "without")
    assert equal(weights(out), weights(tmp_path / "without"))
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert [(row["step"], row["budget"]) for row in rows] == [(3, 16), (3, 4), (4, 16), (4, 4)]
    detector, labels = open_detector("digits"), torch.arange(64) % 10
    found = []
    for first in (0, 32):
        samples = elit.sample(elit.load_model(out / "model"), labels[first : first + 32], steps=2, seed=first, budget=4)
        found.append(detector(as_samples(to_uint8(samples))))
    features = torch.cat([each.features for each in found])
    real = as_samples(to_uint8(digits().images))
    expected = frechet_distance(*moments([detector(real).features]), *moments([features]))
    assert rows[-1]["fd"] == pytest.approx(expected, rel=1e-4)
    assert rows[-1]["accuracy"] == (torch.cat([each.label for each in found]) == labels).float().mean().item()
    assert Image.open(out / "scores.png").width > 500
    events = EventAccumulator(str(next((out / "logs").rglob("events*")).parent)).Reload()
    assert [each.value for each in events.Scalars("fd/4")] == pytest.approx([row["fd"] for row in rows[1::2]])
    assert [path.name for path in (out / "scores").iterdir()] == ["references"]


def test_two_processes_score_together(tmp_path):
    config = tiny(tmp_path / "run", fsdp=True, async_checkpoints=True, checkpoint_every=2, **SCORED)
    run_two(command(config, tmp_path / "config.yaml"), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "run" / "scores.jsonl").read_text().splitlines()]
    assert [(row["step"], row["budget"]) for row in rows] == [(3, 16), (3, 4), (6, 16), (6, 4)]
    folder = tmp_path / "run" / "checkpoints" / "step-00000006"
    assert equal(elit.load_model(folder).state_dict(), weights(tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_detector": "nothing"}, "detector must be one of .*, got 'nothing'"),
        ({"score_reference": "nowhere"}, "cannot read 'nowhere': must be a folder"),
    ],
)
def test_scores_that_cannot_be_are_refused_before_anything_is_written(tmp_path, capsys, changes, message):
    save_config(tiny(tmp_path / "run", **SCORED | changes), tmp_path / "config.yaml")
    assert main(["train", "--config", str(tmp_path / "config.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("elit train: ")
    assert re.search(message, line)
    assert not (tmp_path / "run").exists()


def test_steps_go_on_while_a_checkpoint_is_written_and_the_next_save_waits(tmp_path, monkeypatch):
    release, clips, write, clip = threading.Event(), [], checkpoint.CheckpointWriter._write, loop.clip_gradients

    def slow(self, tensors, step):
        assert release.wait(60)
        write(self, tensors, step)

    def counted(*arguments):
        clips.append(len(list((tmp_path / "run" / "checkpoints").glob("step-*"))))
        if len(clips) == 4:
            release.set()
        return clip(*arguments)

    monkeypatch.setattr(checkpoint.CheckpointWriter, "_write", slow)
    monkeypatch.setattr(loop, "clip_gradients", counted)
    config = tiny(tmp_path / "run", steps=8, checkpoint_every=2, keep_last=9, async_checkpoints=True)
    train(config)
    assert clips[:4] == [0, 0, 0, 0]
    assert clips[4] >= 1  # the save after step 4 waited for that after step 2, and may be done itself
    monkeypatch.undo()
    train(replace(config, out=str(tmp_path / "plain"), async_checkpoints=False))
    for step in (2, 4, 6, 8):
        a, b = (
            elit.load_model(tmp_path / run / "checkpoints" / f"step-{step:08d}").state_dict()
            for run in ("run", "plain")
        )
        assert equal(a, b)


def test_a_checkpoint_that_cannot_be_written_in_the_background_stops_the_run(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.dcp, "save", full)
    with pytest.raises(OSError, match=r"checkpoint of step 2: cannot be written .*No space left"):
        train(tiny(tmp_path / "run", checkpoint_every=2, async_checkpoints=True))
