"""Read's attention and losses by token: against scipy, and against the forward and the training loss."""

import copy

import pytest
import scipy.stats
import torch
from conftest import ELIT, conditions, fresh, opened

from elit.evaluate.inspect.attention import Probe, losses, rank_correlation, read_attention, read_maps
from elit.flow.path import flow_matching_loss, interpolate
from elit.models.layers import patchify
from elit.sampling.engine import seeded_noise


@pytest.fixture(params=[kind for kind in ELIT if kind != "elit-sit"])  # the published SiT uses all its latents
def elit_model(request):
    return opened(request.param)


def probe_of(model, **settings):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, model.config.in_channels, *model.sample_size, generator=generator)
    return Probe(x=x, y=conditions(model, 3), **({"times": (0.3, 0.8), "draws": 2, "batch_size": 4} | settings))


def test_rank_correlation_is_scipys_with_ties_in_many_rows_and_nan_for_constants():
    a, b = torch.randint(0, 9, (2, 4, 5, 64), generator=torch.Generator().manual_seed(0))
    found = rank_correlation(a, b)
    assert found.shape == (4, 5)
    for row in range(4):
        expected = scipy.stats.spearmanr(a[row, 2], b[row, 2]).statistic
        assert found[row, 2].item() == pytest.approx(expected, abs=1e-12)
    assert rank_correlation(a, a**3).allclose(torch.ones(4, 5, dtype=torch.float64))
    assert rank_correlation(torch.ones(4), torch.arange(4)).isnan()


def test_losses_are_those_of_training(any_model):
    probe = probe_of(any_model)
    found = losses(any_model, probe)
    for i, time in enumerate(probe.times):
        expected = torch.zeros(3)
        for draw in range(2):
            x0 = seeded_noise([3 * draw + b for b in range(3)], probe.x.shape[1:])
            t = torch.full((3,), time)
            with torch.no_grad():
                v = any_model(interpolate(x0, probe.x, t), t, probe.y)
            expected += flow_matching_loss(v, x0, probe.x) / 2
        assert torch.allclose(found[i].float(), expected, rtol=1e-5)


def test_maps_are_attention_and_token_losses(elit_model):
    probe = probe_of(elit_model, times=(0.4,), draws=1)
    found = read_maps(elit_model, probe)
    x0 = seeded_noise(range(3), probe.x.shape[1:])
    t = torch.full((3,), 0.4)
    maps = read_attention(elit_model, interpolate(x0, probe.x, t), t, probe.y)  # (B, J, *grid)
    size = probe.x.shape[2:]
    tokens = patchify(maps, (1,) * len(size), elit_model.windows(size, maps))  # (B, N, J)
    assert torch.allclose(found.latents.float(), tokens, atol=1e-6)
    assert torch.allclose(found.attention[0].float(), tokens.sum(2), atol=1e-5)
    kept, n = tokens.shape[2], found.tokens_per_group
    assert torch.allclose(found.attention[0].unflatten(1, (-1, n)).sum(2), torch.tensor(float(kept)).double())
    assert torch.allclose(found.loss.mean(2), losses(elit_model, probe), atol=1e-6)
    expected = scipy.stats.spearmanr(found.attention[0, 1], found.loss[0, 1]).statistic
    assert found.correlation()[0, 1].item() == pytest.approx(expected, abs=1e-9)
    each = [
        scipy.stats.spearmanr(a, b).statistic
        for a, b in zip(found.attention[0, 1].view(-1, n), found.loss[0, 1].view(-1, n), strict=True)
    ]
    assert not elit_model.latent_interface.reader._forward_pre_hooks
    assert found.correlation_in_windows()[0, 1].item() == pytest.approx(sum(each) / len(each), abs=1e-9)


def test_maps_are_means_over_draws_and_times(elit_model):
    whole = read_maps(elit_model, probe_of(elit_model))
    given = [{"times": (time,), "draws": 1, "seed": 3 * draw} for time in (0.3, 0.8) for draw in range(2)]
    parts = [read_maps(elit_model, probe_of(elit_model, **each)) for each in given]
    for name in ("attention", "loss"):
        found = torch.cat([getattr(part, name) for part in parts]).unflatten(0, (2, 2)).mean(1)
        assert torch.allclose(getattr(whole, name), found, atol=1e-6)
    assert torch.allclose(whole.latents, sum(part.latents for part in parts) / 4, atol=1e-6)


def test_a_velocity_that_is_not_finite_and_a_baseline_are_errors():
    broken = copy.deepcopy(opened("elit-dit"))
    with torch.no_grad():
        broken.latent_interface.latents[5] = float("nan")
    with pytest.raises(FloatingPointError, match=r"velocity at t = 0\.3 is not finite"):
        losses(broken, probe_of(broken))
    with pytest.raises(ValueError, match="cannot inspect a baseline, which has no Read"):
        read_maps(fresh("dit"), probe_of(fresh("dit")))
