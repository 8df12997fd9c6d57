"""The estimate of a run against its measured cost, and the recipes against the paper."""

from pathlib import Path

import pytest
import torch
from conftest import SETTINGS, inputs, opened
from diffusers.training_utils import EMAModel
from torch.distributed._tools.mem_tracker import MemTracker

import elit
from elit.budgets import training_budgets
from elit.cli.main import main
from elit.compat import fake_tensors
from elit.config import ModelConfig, TrainConfig, load_config
from elit.costs.flops import TRAINING, paper_tflops, training_tflops
from elit.costs.memory import estimate
from elit.models.interface import LatentInterface

pytestmark = pytest.mark.slow

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
SMALL = {"sample_size": 16, "in_channels": 4, "hidden_size": 96, "num_heads": 4, "depth": 3}
DIT = ModelConfig(name="ELIT-DiT-S/2", **SMALL)


def measured_peak(config: TrainConfig) -> int:
    model = elit.create_model(**config.model.arguments())
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    ema = EMAModel(model.parameters(), foreach=True)
    batch = config.batch_size // config.gradient_accumulation

    def step() -> None:
        x, t, y = torch.randn(batch, 4, 16, 16), torch.rand(batch), model.conditioning.example(batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            velocity = model(x, t, y)
        torch.nn.functional.mse_loss(velocity.float(), x).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())

    step()  # Adam's moments are there from the first step on
    tracker = MemTracker()
    tracker.track_external(model, optimizer, *ema.shadow_params)
    with tracker:
        step()
    return next(iter(tracker.get_tracker_snapshot("peak").values()))["Total"]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ELIT-DiT-S/2", {"gradient_checkpointing": True, "gradient_accumulation": 4}),
        ("ELIT-DiT-S/2", {"precision": "bf16"}),
        ("ELIT-U-ViT-S/2", {}),
        ("ELIT-HDiT-S/2", {}),
        ("ELIT-MM-DiT-S/2", {}),
    ],
)
def test_memory_is_within_15_percent_of_the_measured_peak(name, changes):
    config = TrainConfig(model=ModelConfig(name=name, **SMALL), batch_size=32, **changes)
    assert estimate(config).peak == pytest.approx(measured_peak(config), rel=0.15)


def test_parts_add_up_and_devices_share_the_batch():
    config = TrainConfig(model=DIT, batch_size=32, steps=1000)
    one, four = estimate(config), estimate(config, devices=4)
    assert one.weights == 4 * one.parameters == one.average == one.optimizer / 2
    assert one.activations == pytest.approx(4 * four.activations, rel=0.01)
    assert one.activations_checkpointed < 0.6 * one.activations
    assert one.device_days == four.device_days == pytest.approx(1000 * one.tflops / (989 * 0.4) / 86_400)
    with pytest.raises(ValueError, match="devices=3: batch_size=32 must divide"):
        estimate(config, devices=3)
    with pytest.raises(ValueError, match=r"utilisation must be .*got 1\.5"):
        estimate(config, utilisation=1.5)


def test_sharding_divides_all_but_what_is_gathered():
    settings = {"model": DIT, "batch_size": 32}
    copied = estimate(TrainConfig(**settings), devices=4)
    sharded = estimate(TrainConfig(**settings, fsdp=True), devices=4)
    for part in ("weights", "optimizer", "average"):
        assert getattr(sharded, part) == pytest.approx(getattr(copied, part) / 4, rel=1e-3)
    assert sharded.activations == copied.activations
    assert 0 < sharded.gathered < copied.weights
    accumulated = estimate(TrainConfig(**settings, fsdp=True, gradient_accumulation=2), devices=4)
    assert accumulated.gathered == sharded.gathered + copied.weights  # whole gradients, until the last micro-batch
    muon = estimate(TrainConfig(**settings, optimizer="muon"))
    assert muon.optimizer == 8 * muon.parameters - 4 * muon.groups["muon"]
    assert sum(muon.groups.values()) == muon.parameters
    assert sharded.peak < copied.peak
    assert copied.gathered == estimate(TrainConfig(**settings, fsdp=True)).gathered == 0  # one device has no one to ask
    assert estimate(TrainConfig(**settings, ema_on_cpu=True)).average == 0


@pytest.mark.parametrize("path", [path for path in RECIPES if "imagenet" in str(path)], ids=lambda path: path.stem)
def test_recipes_cost_what_the_paper_says(path):
    config = load_config(path)
    multi = path.stem.endswith("-mb")
    row, pixels = config.model.name + " MB" * multi, int(path.parent.name[-3:])
    with torch.device("meta"):
        model = elit.create_model(**config.model.arguments())
    drawn = training_budgets(model.budgets, config.budget_min, config.budget_max) or (None,)
    assert len(set(drawn)) > 1 if multi else drawn in ((None,), model.budgets[-1:])
    tflops = training_tflops(model, config.batch_size, drawn)
    assert tflops == pytest.approx(TRAINING[row][pixels == 512], rel=0.025)
    assert tflops == pytest.approx(paper_tflops(row, pixels))


def test_a_dry_run_in_words(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = next(path for path in RECIPES if path.match("kinetics/elit-dit-xl-mb.yaml"))
    line = ["train", "--config", str(recipe), "--dry-run", "--devices"]
    assert main([*line, "32"]) == 0
    out = capsys.readouterr().out
    assert "ELIT-DiT-XL/2-Video: 698.6M parameters" in out
    assert "days on 32" in out
    assert "gathered" not in out
    assert main([*line, "32", "--fsdp", "--optimizer", "muon"]) == 0
    out = capsys.readouterr().out
    assert "gathered" in out
    assert "(28.31M adamw, 1.41M adamw without decay, 668.86M muon)" in out
    assert main([*line, "7"]) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["elit-mmdit", "elit-hdit", "part"])
def test_a_dry_run_on_a_grid_that_does_not_divide_leaves_nothing_behind(kind):
    """Fake tensors' tables would be found again by the next forward of that grid."""
    if kind == "part":
        model = LatentInterface(16, 2, (4, 4), 8)
        options = {"core": lambda latents, _: latents, "grid": (7, 9)}
        with fake_tensors():
            LatentInterface(16, 2, (4, 4), 8)(torch.zeros(1, 63, 16), **options)
        assert type(model(torch.randn(1, 63, 16), **options)) is torch.Tensor
    else:
        sizes = {"sample_size": (14, 18), "hidden_size": 48, "num_heads": 4, "depth": 4, "split": (1, 2, 1)}
        sizes |= {"window": (4, 4), "num_latents": 16}
        config = ModelConfig(name=SETTINGS[kind][0], **sizes)
        estimate(TrainConfig(model=config, data="digits", batch_size=1))
        model = opened(kind, sample_size=(14, 18))
        assert model(*inputs(model)).isfinite().all()
