"""Two gloo processes as one run: killed, stopped, resumed by one or the other number, sharded."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import BACKEND, run_two, start_two
from test_loop import command, equal, losses, steps_done, tiny, weights

import elit
from elit.config import TrainConfig
from elit.training.train import train

pytestmark = pytest.mark.slow

SETTINGS = {"steps": 24, "checkpoint_every": 5, "log_every": 1, "ema_decay": 0.9, "gradient_accumulation": 2}


def together(config: TrainConfig, folder: Path, **environment: str) -> str:
    return "".join(run.err for run in run_two(command(config, folder / "config.yaml"), folder, **environment))


def close(a: Path, b: Path, *, abs: float = 1e-4) -> bool:
    one, two = losses(a), losses(b)
    count = min(len(one), len(two))
    return [row[1] for row in one[:count]] == pytest.approx([row[1] for row in two[:count]], abs=abs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    together(tiny(out / "run", **SETTINGS), out)
    return out / "run"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    train(tiny(out, **SETTINGS))
    return out


def test_two_processes_match_one(whole, alone):
    assert [row[2] for row in losses(alone)] == [row[2] for row in losses(whole)]
    assert close(alone, whole, abs=1e-5)
    a, b = weights(alone), weights(whole)
    assert max((a[key] - b[key]).abs().max().item() for key in a) < 1e-4


def test_killed_twice_and_resumed_is_bit_equal(tmp_path, whole):
    out, moments = tmp_path / "killed", random.Random(time.time_ns())
    line = command(tiny(out, resume=True, **SETTINGS), tmp_path / "config.yaml")
    for first, last, killed in ((1, 10, 1), (11, 20, 2)):
        runs, step = start_two(line, tmp_path), moments.randint(first, last)
        runs[0].wait_until(lambda step=step: steps_done(out) >= step)
        time.sleep(moments.random() * 0.1)
        for run in moments.sample(runs, killed):
            run.kill()
        assert all(run.wait() != 0 for run in runs)  # where one is gone, the other one ends too
    together(tiny(out, resume=True, **SETTINGS), tmp_path)
    assert losses(out) == losses(whole)
    assert len(losses(out)) == 24
    assert equal(weights(out), weights(whole))


def test_sigterm_to_one_process_stops_both_at_the_same_step(tmp_path):
    out = tmp_path / "run"
    config = tiny(out, steps=400, checkpoint_every=1000, log_every=1)
    runs = start_two(command(config, tmp_path / "config.yaml"), tmp_path)
    runs[0].wait_until(lambda: steps_done(out) >= 5)
    os.kill(runs[1].pid, signal.SIGTERM)
    seen, start = steps_done(out), time.perf_counter()
    assert [run.wait() for run in runs] == [0, 0], runs[0].err + runs[1].err
    assert time.perf_counter() - start < 15
    (saved,) = (out / "checkpoints").iterdir()
    step = int(saved.name[5:])
    assert f"stopped by SIGTERM after step {step}, checkpoint saved" in runs[0].err
    assert 5 <= step <= seen + 10  # within a step of when it was noticed; more were done while this test looked
    assert steps_done(out) == step


@pytest.mark.parametrize("before", [1, 2])
def test_resumed_by_another_number_of_processes(tmp_path, before, whole, alone, capfd):
    """One goes on as two and two as one, with a line, to the same numbers but for rounding."""
    out, longer = tmp_path / "run", tmp_path / "alone"
    shutil.copytree(alone if before == 1 else whole, out)
    shutil.copytree(alone, longer)
    config = tiny(out, resume=True, **SETTINGS | {"steps": 30})
    said = together(config, tmp_path) if before == 1 else [train(config), capfd.readouterr().err][1]
    assert f"changed: processes {before} → {3 - before}; sums run in another order" in said
    assert "changed: out" not in said
    train(replace(config, out=str(longer)))
    assert len(losses(out)) == 30
    assert close(out, longer)


SHARDED = SETTINGS | {"steps": 12, "checkpoint_every": 10, "keep_every": 10}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A sharded run of two processes that draws previews, the last of them at its end."""
    out = tmp_path_factory.mktemp("sharded")
    together(tiny(out / "run", fsdp=True, preview_every=7, **SHARDED), out)
    return out / "run"


def test_a_preview_changes_nothing_of_a_sharded_run(tmp_path, sharded):
    """Its forward has the averaged weights; the next training forward has the run's own again, the root's too."""
    without = tmp_path / "without"
    together(tiny(without, fsdp=True, preview_every=0, **SHARDED | {"steps": 10}), tmp_path)
    assert not (without / "samples").exists()
    assert (sharded / "samples" / "step-00000007.png").is_file()
    assert losses(sharded)[:10] == losses(without)
    there = elit.load_model(sharded / "checkpoints" / "step-00000010").state_dict()
    assert equal(there, weights(without))


def test_sharded_matches_replicated(tmp_path, whole, alone, sharded, capfd):
    """FSDP2 against DDP: losses within 1e-4 over 12 steps; its state loads into one plain network, which goes on."""
    out = tmp_path / "sharded"
    shutil.copytree(sharded, out)
    norms = [[row[3] for row in losses(each)[:12]] for each in (out, whole)]
    assert close(out, whole)
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    last = elit.load_model(out / "checkpoints" / "step-00000012")
    assert type(last) is elit.DiT
    assert equal(last.state_dict(), weights(out))
    assert last(torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([1, 2]), 4).isfinite().all()
    assert (out / "samples" / "step-00000012.png").is_file()
    manifest = json.loads((out / "checkpoints" / "step-00000012" / "checkpoint.json").read_text())
    assert {"__0_0.distcp", "__1_0.distcp"} <= set(manifest["files"])  # each process wrote its part
    train(tiny(out, resume=True, **SETTINGS))  # one process, nothing sharded
    assert "fsdp True → False" in capfd.readouterr().err
    assert close(out, alone)


def test_sharded_with_everything_else(tmp_path, monkeypatch):
    """None of it changes a sharded run more than a single one. What a compiler makes of the graphs is test_loop's."""
    settings, backend = {"steps": 6, "precision": "bf16", "ema_on_cpu": True, "optimizer": "muon"}, "eager"
    settings |= {"gradient_checkpointing": True, "compile": True}
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    together(tiny(tmp_path / "sharded", fsdp=True, **settings), tmp_path, **{BACKEND: backend})
    train(tiny(tmp_path / "one", **settings))
    assert close(tmp_path / "sharded", tmp_path / "one")


def test_a_refusal_reaches_all_processes(tmp_path):
    config = tiny(tmp_path / "run", steps=1)
    train(config)
    runs = start_two(command(config, tmp_path / "config.yaml"), tmp_path)
    assert [run.wait() for run in runs] == [2, 2]
    for run in runs:
        assert run.err.startswith("elit train: out=")
        assert "holds a run at step 1; set resume" in run.err


def test_accelerates_own_sharding_is_refused_with_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"ACCELERATE_USE_FSDP is set: launch with .*MULTI_GPU and give --fsdp"):
        train(tiny(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_sharded_run_on_cuda_ends_with_its_average_on_the_cpu(tmp_path, optimizer):
    """Over NCCL alone, which gathers nothing from the CPU's memory."""
    settings = {"gradient_accumulation": 2, "precision": "bf16", "compile": True, "optimizer": optimizer}
    config = tiny(tmp_path / "run", fsdp=True, ema_on_cpu=True, preview_every=3, **settings)
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "-m", "elit"]
    done = subprocess.run([*line, *command(config, tmp_path / "config.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(weight.isfinite().all() for weight in weights(tmp_path / "run").values())
