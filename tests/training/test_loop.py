"""Training: bit-equal after kills, equal over processes, refusals before anything is written."""

import itertools
import json
import re
import shutil
import signal
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import elit
from elit.config import ModelConfig, TrainConfig, load_config, save_config
from elit.training.checkpoint import AveragedWeights
from elit.training.distributed import clip_gradients, make_accelerator
from elit.training.loop import train_task
from elit.training.task import FlowMatching
from elit.training.train import train

pytestmark = pytest.mark.slow

TINY = ModelConfig(name="ELIT-DiT-S/1", hidden_size=16, num_heads=1, depth=3, split=(1, 1, 1), window=(4, 4))


def tiny(out: Path, **changes) -> TrainConfig:
    settings = {"steps": 6, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 2, "preview_every": 0}
    return TrainConfig(out=str(out), **settings | {"model": TINY} | changes)


def losses(out: Path) -> list[tuple[int, float, int, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["budget"], line["gradient_norm"]) for line in lines]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return elit.load_model(out / "model").state_dict()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def command(config: TrainConfig, path: Path) -> list[str]:
    save_config(config, path)
    return ["train", "--config", str(path)]


def steps_done(out: Path) -> int:
    return len((out / "metrics.jsonl").read_bytes().splitlines()) if (out / "metrics.jsonl").is_file() else 0


LONG = {"steps": 20, "checkpoint_every": 7, "log_every": 1, "gradient_accumulation": 2}
LONG |= {"optimizer": "muon", "schedule": "cosine"}  # which has weights by AdamW, too


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    train(tiny(out, **LONG))
    return out


SHORT = {"preview_every": 4, "precision": "bf16", "gradient_checkpointing": True, "checkpoint_every": 1}
SHORT |= {"keep_last": 2, "keep_every": 3}


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    out = tmp_path_factory.mktemp("short") / "run"
    return out, train(tiny(out, **SHORT))


@pytest.fixture
def used(short, tmp_path):
    return Path(shutil.copytree(short[0], tmp_path / "run"))


@pytest.fixture
def heeds_ctrl_c():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
@pytest.mark.parametrize(("number", "times"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGINT, 2)])
def test_a_signal_saves_a_checkpoint_and_a_second_ctrl_c_leaves_at_once(
    tmp_path, monkeypatch, capfd, whole, number, times
):
    before, steps, out = signal.getsignal(number), itertools.count(1), tmp_path / "run"

    def interrupted(*arguments):
        if next(steps) == 11:
            for _ in range(times):
                signal.raise_signal(number)
        return clip_gradients(*arguments)

    monkeypatch.setattr("elit.training.loop.clip_gradients", interrupted)
    config = tiny(out, **LONG | {"checkpoint_every": 1000})
    with pytest.raises(SystemExit if times == 1 else KeyboardInterrupt) as stopped:
        train(config)
    assert signal.getsignal(number) is before
    saved = [path.name for path in (out / "checkpoints").glob("step-*")]
    assert saved == ["step-00000011"] * (times == 1)
    if times == 2:
        return
    assert stopped.value.code == 0
    name = "SIGTERM" if number == signal.SIGTERM else "Ctrl-C"
    assert f"stopped by {name} after step 11, checkpoint saved" in capfd.readouterr().err
    assert len(losses(out)) == 11
    train(replace(config, resume=True))
    assert losses(out) == losses(whole)
    assert equal(weights(out), weights(whole))


def test_what_a_run_leaves(short):
    out, model = short
    assert sorted(path.name for path in out.iterdir()) == [
        *("checkpoints", "config.yaml", "logs", "metrics.jsonl", "model", "samples")
    ]
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert kept == [f"step-0000000{step}" for step in (3, 5, 6)]  # every third, and the last two
    preview = np.array(Image.open(out / "samples" / "step-00000004.png"))  # 4 budgets × 8, below and beside their names
    assert preview.shape[0] == 20 + 4 * 66 - 2
    left = preview.shape[1] - (8 * 66 - 2)
    assert all((preview[20:][rows * 66 :][:64, :left] < 99).any() for rows in range(4))
    assert all((preview[:20, left + column * 66 :][:, :64] < 99).any() for column in range(8))
    assert list((out / "logs").rglob("events*"))
    assert equal(weights(out), model.state_dict())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_the_averaged_weights_are_saved_and_may_be_on_the_cpu(tmp_path):
    ends = {decay: train(tiny(tmp_path / str(decay), ema_decay=decay)).state_dict() for decay in (0.0, 0.9)}
    last = {name: torch.empty_like(weight) for name, weight in ends[0.0].items()}
    dcp.load({"model": last}, checkpoint_id=tmp_path / "0.0" / "checkpoints" / "step-00000006", no_dist=True)
    assert equal(last, ends[0.0])
    assert not equal(ends[0.0], ends[0.9])
    middle = elit.load_model(tmp_path / "0.9" / "checkpoints" / "step-00000006").state_dict()
    assert equal(middle, ends[0.9])
    assert equal(train(tiny(tmp_path / "cpu", ema_decay=0.9, ema_on_cpu=True)).state_dict(), ends[0.9])


def test_step_draws_are_a_function_of_seed_and_step(tmp_path):
    config = tiny(tmp_path, batch_size=4096, class_dropout=0.1)
    settings = {"moments": True, "drop_condition": lambda y, dropped: y, "autocast": nullcontext}
    objective = FlowMatching(config=config, shape=(1, 2, 2), device=torch.device("cpu"), **settings)
    noise, t, dropped, posterior = objective.draw(3)
    assert all(map(torch.equal, (noise, t, dropped, posterior), objective.draw(3)))
    assert not torch.equal(noise, objective.draw(4)[0])
    assert not torch.equal(noise, posterior)
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.02)
    # Mirrored samples change no other draw.
    settings |= {"moments": False, "config": replace(config, horizontal_flip=True)}
    flipped = FlowMatching(shape=(1, 2, 2), device=torch.device("cpu"), **settings)
    *others, mirrored = flipped.draw(3)
    assert all(map(torch.equal, others, (noise, t, dropped)))
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.03)
    pictures = torch.arange(8.0).view(1, 1, 2, 4).repeat(4096, 1, 1, 1)
    made, *_ = flipped.noised((pictures, t), (*(each[..., :1] for each in (noise,)), t, dropped, mirrored))
    assert all(
        torch.equal(made[mirrored == on], (pictures.flip(3) if on else pictures)[mirrored == on]) for on in (0, 1)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "missing-folder"}, "data must be a folder, a file or one of digits, .*, got 'missing-folder'"),
        ({"model": replace(TINY, name="ELIT-DiT-M/1")}, "unknown model 'ELIT-DiT-M/1'; close names"),
        ({"model": replace(TINY, sample_size=16)}, "model.sample_size=16: the data has 8"),
        ({"model": replace(TINY, window=(3,))}, r"window must be 2 numbers, as many as patch_size has, got \(3,\)"),
        ({"budget_max": 17}, "budget_max <= 16, got 1 and 17"),
        ({"validation_share": 0.1}, "score_every must be above 0 with validation_share, got 0"),
        ({"score_every": 1, "score_samples": 0}, "score_samples must be at least 2, got 0"),
        ({"model": ModelConfig(name="DiT-S/1"), "budget_min": 1}, "no latent interface"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(tiny(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resume": False}, "holds a run at step 6; set resume"),
        ({"model": replace(TINY, hidden_size=32)}, r"resume: model\.hidden_size 16 → 32 cannot change"),
        ({"batch_size": 16, "seed": 1}, "resume: batch_size 8 → 16, seed 0 → 1 cannot change"),
        ({"steps": 3}, r"steps=3: the run in .* is at step 6"),
    ],
)
def test_a_used_folder_is_refused_and_so_is_another_network(short, changes, message):
    with pytest.raises(ValueError, match=message):
        train(tiny(short[0], **SHORT | {"resume": True} | changes))


def test_what_may_change_is_said_and_changes(used, capfd):
    train(tiny(used, **SHORT, resume=True, steps=8, learning_rate=1e-4))
    printed = capfd.readouterr().err
    assert printed.startswith("resumed from step 6\nchanged: steps 6 → 8, learning_rate 0.001 → 0.0001\n")
    assert re.search(r"^step 7/8 · loss \S+ · \S+ images/s · .* · 0:00:\d\d passed, \S+ to go$", printed, re.M)
    assert re.search(r"^step 8/8 .* passed, 0:00:00 to go$", printed, re.M)
    assert json.loads((used / "metrics.jsonl").read_text().splitlines()[-1])["lr"] == 1e-4
    assert load_config(used / "config.yaml").learning_rate == 1e-4


def test_a_baselines_weights_start_an_elit_run(tmp_path, capfd):
    plain, init = ModelConfig(name="DiT-S/1", hidden_size=16, num_heads=1, depth=3), str(tmp_path / "plain" / "model")
    train(tiny(tmp_path / "plain", model=plain))
    capfd.readouterr()
    elastic = train(tiny(tmp_path / "elit", init=init, steps=1, learning_rate=1e-12)).state_dict()
    said = " ".join(capfd.readouterr().err.split())
    assert "weights start anew (latent_interface" in said
    assert "0 left out (none)" in said
    assert all(torch.allclose(elastic[name], value, atol=1e-9) for name, value in weights(tmp_path / "plain").items())
    assert not elastic["latent_interface.writer.mlp.fc2.weight"].abs().max() > 1e-9
    with pytest.raises(ValueError, match="shares no weights"):
        train(tiny(tmp_path / "other", model=replace(plain, hidden_size=24), init=init))


def test_compiled_blocks_share_two_graphs_over_all_budgets(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, dynamic=True, backend="aot_eager"))  # graphs alone
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    out, settings = tmp_path / "run", {"steps": 21, "seed": 1861}  # draws all of them the soonest
    train(tiny(out, **settings, compile=True))
    assert {row[2] for row in losses(out)} == set(range(1, 17))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert not torch._dynamo.utils.counters["graph_break"]
    train(tiny(tmp_path / "eager", **settings))
    eager = [row[1] for row in losses(tmp_path / "eager")]
    assert [row[1] for row in losses(out)] == pytest.approx(eager, abs=1e-4)


def test_figures_of_a_run(tmp_path):
    train(tiny(tmp_path / "run", steps=10, log_every=5))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row[name] > 0 for row in rows for name in ("images_per_s", "tflops_per_s", "memory_gib"))
    assert all(0 <= row["data_wait"] < 1 for row in rows)
    assert [len(row.get("loss_by_t", ())) for row in rows] == ([0] * 4 + [10]) * 2
    by_budget: dict[str, list[float]] = {}
    for row in rows[:5]:
        by_budget.setdefault(str(row["budget"]), []).append(row["loss"])
    means = {budget: sum(each) / len(each) for budget, each in by_budget.items()}
    assert rows[4]["loss_by_budget"] == pytest.approx(means, abs=1e-5)
    events = EventAccumulator(str(next((tmp_path / "run" / "logs").rglob("events*")).parent)).Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([row["loss"] for row in rows])
    assert {"gradient_norm", "images_per_s", "data_wait", "tflops_per_s", "memory_gib"} <= set(events.Tags()["scalars"])
    assert any(tag.startswith("loss_by_t/") for tag in events.Tags()["scalars"])


class Recorded(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network, self.syncs = network, []

    def forward(self, *inputs):
        return self.network(*inputs)

    def set_requires_gradient_sync(self, wanted):
        self.syncs.append(wanted)


def test_a_sharded_network_reduces_gradients_once_a_step(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("elit.training.loop.FSDPModule", Recorded)
    monkeypatch.setattr(
        "elit.training.loop.prepare", lambda accelerator, network, *_: made.append(Recorded(network)) or made[0]
    )
    train(tiny(tmp_path / "run", steps=2, gradient_accumulation=4))
    assert made[0].syncs == [False, False, False, True] * 2


def test_a_sharded_average_on_the_cpu_is_gathered_on_the_meshs_device(monkeypatch):
    """NCCL cannot gather what is in the CPU's memory."""

    class Sharded:
        device_mesh, place = SimpleNamespace(device_type="cuda"), "cpu"

        def to(self, place):
            self.place = place
            return self

        def full_tensor(self):
            assert self.place == "cuda"
            return torch.ones(2)

    monkeypatch.setattr("elit.training.checkpoint.DTensor", Sharded)
    average = AveragedWeights(torch.nn.Linear(3, 2), 0.8)
    average.weights["bias"] = Sharded()
    assert average.whole()["bias"].tolist() == [1, 1]


def test_processes_wait_for_one_that_works_alone(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr("elit.training.distributed.Accelerator", lambda **settings: given.update(settings))
    make_accelerator(tiny(tmp_path))
    timeouts = [each.timeout for each in given["kwargs_handlers"] if hasattr(each, "timeout")]
    assert timeouts[0].total_seconds() >= 3600


def test_float32_on_a_gpu_is_tf32_while_a_run_lasts(tmp_path, monkeypatch):
    accelerator = SimpleNamespace(device=torch.device("cuda"), end_training=lambda: None)
    monkeypatch.setattr("elit.training.loop.make_accelerator", lambda config: accelerator)
    monkeypatch.setattr("elit.training.loop.claimed_folder", lambda *_: nullcontext())
    monkeypatch.setattr("elit.training.loop.run", lambda *_: torch.get_float32_matmul_precision())
    task = SimpleNamespace(network=torch.nn.Linear(1, 1), config=None)
    assert train_task(tiny(tmp_path), lambda accelerator: task) == "high"
    assert torch.get_float32_matmul_precision() == "highest"


# Kinds of block, each twice where its length changes with the budget; U-ViT's with a skip are another kind.
GRAPHS = {"dit": 1, "elit-dit": 2, "uvit": 2, "elit-uvit": 4, "elit-hdit": 4, "elit-mmdit": 4}
GRAPHS |= {"elit-dit-video": 2, "elit-sit": 2}
