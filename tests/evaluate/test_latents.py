"""Looking inside: against scipy, against a forward by hand, and against attention that is masked instead of cut."""

import copy
import inspect as signatures
import re

import pytest
import scipy.stats
import torch
from conftest import ELIT, conditions, fresh, inputs, opened

from elit.evaluate.inspect.attention import read_attention
from elit.evaluate.inspect.probe import (
    Probe,
    look,
    losses,
    losses_without,
    only_latents,
    rank_correlation,
    single_drops,
)
from elit.flow.path import flow_matching_loss, interpolate
from elit.models.interface import latent_positions
from elit.models.layers import grid_positions, patchify, rope_tables, unpatchify
from elit.models.layout import parts_of
from elit.sampling.sample import seeded_noise


@pytest.fixture(params=[kind for kind in ELIT if kind != "elit-sit"])  # the published SiT uses all its latents
def elit_model(request):
    return opened(request.param)


def probe_of(model, **settings):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, model.config.in_channels, *model.sample_size, generator=generator)
    return Probe(x=x, y=conditions(model, 3), **({"times": (0.3, 0.8), "draws": 2, "batch_size": 4} | settings))


def by_hand(model, x, t, y, slots):
    """The forward with the latents of `slots` alone, each at its own coordinate, spelled out."""
    size, window = x.shape[2:], model.window(x.shape[2:])
    head_width = model.config.hidden_size // model.config.num_heads
    rope = rope_tables(grid_positions(model.token_grid(size), window, x.device), head_width)
    head, core, tail = model.stages()
    c, aux = model.condition(t, y)
    s, aux = model.run_blocks(head, model.patch_embed(patchify(x, model.patch_size, window)), c, rope, aux)
    interface = model.latent_interface
    tokens = s.reshape(-1, len(interface.position), s.shape[2])
    latents = interface.reader(interface.latents[slots], tokens + interface.position, c)
    grid = model.token_grid(size)
    everywhere = latent_positions(grid, window, parts_of(grid, window, len(interface.latents)), x.device)
    kept = torch.isin(everywhere[:, 0], torch.tensor(slots, dtype=torch.float32))
    latents, aux = model.run_blocks(core, latents, c, rope_tables(everywhere[kept], head_width), aux)
    s, _ = model.run_blocks(tail, interface.write(s, latents), c, rope, aux)
    return unpatchify(model.final(s, c), size, model.patch_size, window)


@pytest.mark.parametrize("values", [[3.0, 1, 2, 2, 5, 2], [1.0, 2, 3], [0.5, 0.5, 0.1]])
def test_rank_correlation_is_scipys(values):
    generator = torch.Generator().manual_seed(0)
    a = torch.tensor(values)
    for other in (torch.randn(len(a), generator=generator), a**3, -a):
        assert rank_correlation(a, other).item() == pytest.approx(scipy.stats.spearmanr(a, other).statistic, abs=1e-12)


def test_rank_correlation_of_many_rows_with_ties_and_of_constants():
    a, b = torch.randint(0, 9, (2, 4, 5, 64), generator=torch.Generator().manual_seed(0))
    found = rank_correlation(a, b)
    assert found.shape == (4, 5)
    assert found[1, 2].item() == pytest.approx(scipy.stats.spearmanr(a[1, 2], b[1, 2]).statistic, abs=1e-12)
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


def test_a_look_is_made_of_attention_maps_and_token_losses(elit_model):
    probe = probe_of(elit_model, times=(0.4,), draws=1)
    seen = look(elit_model, probe)
    x0 = seeded_noise(range(3), probe.x.shape[1:])
    t = torch.full((3,), 0.4)
    maps = read_attention(elit_model, interpolate(x0, probe.x, t), t, probe.y)  # (B, J, *grid)
    window = elit_model.window(probe.x.shape[2:])
    tokens = patchify(maps, (1,) * len(window), window)  # (B, N, J)
    assert torch.allclose(seen.latents.float(), tokens, atol=1e-6)
    assert torch.allclose(seen.attention[0].float(), tokens.sum(2), atol=1e-5)
    kept, n = tokens.shape[2], seen.tokens_per_group
    assert torch.allclose(seen.attention[0].unflatten(1, (-1, n)).sum(2), torch.tensor(float(kept)).double())
    in_windows = tokens.unflatten(1, (-1, n)).numpy()  # (B, G, n, J)
    assert torch.allclose(seen.entropy[0], torch.tensor(scipy.stats.entropy(in_windows, axis=2).mean(1)).double())
    assert torch.allclose(seen.loss.mean(2), losses(elit_model, probe), atol=1e-6)
    expected = scipy.stats.spearmanr(seen.attention[0, 1], seen.loss[0, 1]).statistic
    assert seen.correlation()[0, 1].item() == pytest.approx(expected, abs=1e-9)
    each = [
        scipy.stats.spearmanr(a, b).statistic
        for a, b in zip(seen.attention[0, 1].view(-1, n), seen.loss[0, 1].view(-1, n), strict=True)
    ]
    assert seen.correlation_in_windows()[0, 1].item() == pytest.approx(sum(each) / len(each), abs=1e-9)


def test_a_look_averages_over_draws_and_times(elit_model):
    whole = look(elit_model, probe_of(elit_model))
    parts = [
        look(elit_model, probe_of(elit_model, times=(time,), draws=1, seed=3 * draw))
        for time in (0.3, 0.8)
        for draw in range(2)
    ]
    for name in ("attention", "loss", "entropy"):
        found = torch.cat([getattr(part, name) for part in parts]).unflatten(0, (2, 2)).mean(1)
        assert torch.allclose(getattr(whole, name), found, atol=1e-6)
    assert torch.allclose(whole.latents, sum(part.latents for part in parts) / 4, atol=1e-6)


def test_losses_are_the_same_for_any_batch(elit_model):
    drop = single_drops(elit_model)[0]
    one, two = (losses_without(elit_model, probe_of(elit_model, batch_size=size), drop) for size in (6, 1))
    assert torch.allclose(one, two, rtol=1e-5)


def test_dropping_the_tail_is_a_budget_bit_for_bit(elit_model):
    probe, last = probe_of(elit_model), single_drops(elit_model)[-1]
    assert torch.equal(losses_without(elit_model, probe, last), losses(elit_model, probe, elit_model.budgets[-2]))


def test_leaving_a_latent_out_is_the_forward_by_hand(elit_model):
    x, t, y = inputs(elit_model)
    drops = single_drops(elit_model)
    assert [slot for dropped in drops for slot in dropped] == list(range(elit_model.budgets[-1]))
    for dropped in (drops[0], drops[len(drops) // 2], drops[-1]):
        slots = [slot for slot in range(elit_model.budgets[-1]) if slot not in dropped]
        with torch.no_grad():
            expected = by_hand(elit_model, x, t, y, slots)
            with only_latents(elit_model, slots) as budget:
                assert torch.equal(elit_model(x, t, y, budget), expected)


@pytest.mark.parametrize("kind", ["elit-dit", "elit-uvit", "elit-dit-video"])
def test_leaving_a_latent_out_is_attention_that_does_not_see_it(kind, monkeypatch):
    model = opened(kind)
    x, t, y = inputs(model)
    head, core, _ = (len(stage) for stage in model.stages())
    slot, count = 1, model.budgets[-1]
    attention, calls = torch.nn.functional.scaled_dot_product_attention, []

    def masked(q, k, v, **options):
        calls.append(k.shape[2])
        if head + 1 < len(calls) <= head + core + 2:  # after head and Read: the core, and Write
            assert k.shape[2] % count == 0
            return attention(q, k, v, attn_mask=(torch.arange(k.shape[2]) % count != slot)[None])
        return attention(q, k, v, **options)

    with torch.no_grad():
        with only_latents(model, [j for j in range(count) if j != slot]) as budget:
            found = model(x, t, y, budget)
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", masked)
        assert torch.allclose(found, model(x, t, y), atol=1e-5)
    assert len(calls) == len(model.blocks) + 2


def test_nothing_is_left_behind(elit_model):
    x, t, y = inputs(elit_model)
    with torch.no_grad():
        before, attributes = elit_model(x, t, y), set(vars(elit_model))
        look(elit_model, probe_of(elit_model))
        losses_without(elit_model, probe_of(elit_model), single_drops(elit_model)[0])
        with pytest.raises(RuntimeError, match="within"), only_latents(elit_model, range(elit_model.budget_step)):
            raise RuntimeError("within")
        assert torch.equal(elit_model(x, t, y), before)
    assert set(vars(elit_model)) == attributes
    assert not elit_model.latent_interface.reader._forward_pre_hooks
    assert list(signatures.signature(elit_model.forward).parameters) == [
        *("x", "t", "y", "budget", "branch_budgets", "shared")
    ]


def test_a_dropped_latent_may_be_anything_nan_included():
    model = opened("elit-dit")
    probe, broken = probe_of(model), copy.deepcopy(model)
    with torch.no_grad():
        broken.latent_interface.latents[5] = float("nan")
    assert torch.equal(losses_without(broken, probe, [5]), losses_without(model, probe, [5]))
    with pytest.raises(FloatingPointError, match=r"velocity at t = 0\.3 is not finite"):
        losses(broken, probe)


@pytest.mark.parametrize("measure", [look, single_drops, read_attention])
def test_a_baseline_is_refused(measure):
    model = fresh("dit")
    arguments = {look: (probe_of(model),), single_drops: (), read_attention: inputs(model)}[measure]
    with pytest.raises(ValueError, match="model: a baseline has no Read"):
        measure(model, *arguments)


@pytest.mark.parametrize("slots", [[], [0, 16], [-1, 2], [3, 1], [2, 2]])
def test_slots_that_are_not_there_are_refused(slots):
    with (
        pytest.raises(ValueError, match=r"slots=\[.*give some of 0 to 15, ascending"),
        only_latents(fresh("elit-dit"), slots),
    ):
        pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"times": ()}, "times=()"),
        ({"times": (0.5, 1.5)}, "times="),
        ({"times": torch.tensor([1, 2])}, "times=(1, 2): give at least one in [0, 1]"),
        ({"draws": 0}, "draws=0"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_probes_that_are_not_valid_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape("x: shape (2,), expected (B, C, H, W)")):
        Probe(x=torch.tensor([1, 2]), y=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=re.escape(message)):
        probe_of(fresh("elit-dit"), **settings)


def test_the_published_network_is_refused_since_it_reads_dropped_latents_too():
    with pytest.raises(ValueError, match="SiT uses its dropped latents too"), only_latents(opened("elit-sit"), [0]):
        pass
