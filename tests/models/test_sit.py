"""SiT: what is its own. What it shares with the other networks is in test_backbones.py, its published files' in
test_released.py."""

import pytest
import torch
from conftest import inputs, opened

from elit.evaluate.inspect.attention import read_attention
from elit.models.presets import create_model
from elit.models.sit import ddpm_time

ELIT = {"sample_size": 16, "hidden_size": 16, "num_heads": 2, "depth": 3, "split": (1, 1, 1), "window": (4, 4)}


def test_write_looks_at_dropped_latents_and_the_core_does_not():
    model = opened("elit-sit")
    x, t, y = inputs(model)
    seen = []
    hook = model.blocks[1].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    model(x, t, y, 5)
    hook.remove()
    assert seen == [4 * 5]  # 4 groups
    before = model(x, t, y, 5)
    with torch.no_grad():
        model.latent_interface.latents[5:] += 1
    assert not torch.allclose(model(x, t, y, 5), before, atol=1e-3)


def test_its_attention_can_be_looked_at():
    model = opened("elit-sit")
    weights = read_attention(model, *inputs(model), 5)
    assert weights.shape == (3, 16, 8, 8)
    assert torch.allclose(weights.unflatten(2, (2, 4)).unflatten(4, (2, 4)).sum((3, 5)), torch.ones(3, 16, 2, 2))


def test_the_clock_of_ddpm():
    """Steps at their own noise levels, halves between them, and the ends."""
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    level = kept.sqrt() / (kept.sqrt() + (1 - kept).sqrt())
    steps, told = ddpm_time(level)
    assert torch.allclose(steps, torch.arange(1000.0), atol=0.05)
    assert torch.allclose(told, level.float())
    between, _ = ddpm_time((level[300:301] + level[301:302]) / 2)
    assert between.item() == pytest.approx(300.5, abs=0.05)
    ends, told = ddpm_time(torch.tensor([0.0, 1.0]))
    assert ends.tolist() == [999, 0]
    assert told.tolist() == pytest.approx([level[-1].item(), 1.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_latents": 8}, r"num_latents must be 16, one a token, got 8"),
        ({"convention": "sigma"}, "convention must be noise, data or ddpm, got 'sigma'"),
        ({"sample_size": 256}, "sample_size must be at most 4096 tokens"),
        ({"sample_size": (4, 16, 16), "patch_size": (1, 2, 2), "window": (1, 4, 4)}, "SiT takes images"),
    ],
)
def test_what_does_not_fit_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        create_model("ELIT-SiT-S/2", **ELIT | settings)
