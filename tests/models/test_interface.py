"""The interface against dense attention, and the tail drop against truncation and NaN."""

import pytest
import torch
from conftest import inputs, opened
from torch.utils.flop_counter import FlopCounterMode

from elit.models.interface import InterfaceSpec, LatentInterface
from elit.models.windows import Windows


def opened_interface(width=32, heads=4, n=6, latents=5) -> LatentInterface:
    torch.manual_seed(0)
    interface = LatentInterface(width, heads, (n,), latents)
    for parameter in interface.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return interface.double()


def dense(attention, queries, context, allowed):
    """Attention over everything with a mask, heads one by one: no grouping, no fused kernel."""
    h = queries.shape[-1] // attention.num_heads
    q = attention.q(queries).unflatten(-1, (-1, h))
    k, v = (part.unflatten(-1, (-1, h)) for part in attention.kv(context).chunk(2, -1))

    def rms(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    heads = []
    for head in range(attention.num_heads):
        scores = rms(q[:, :, head], attention.q_norm.weight) @ rms(k[:, :, head], attention.k_norm.weight).mT / h**0.5
        heads.append(scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v[:, :, head])
    return attention.proj(torch.cat(heads, -1))


@pytest.mark.parametrize("kept", [1, 3, 5])
def test_grouped_attention_equals_dense_attention_under_a_block_mask(kept):
    B, G, n, d = 2, 4, 6, 32
    interface, windows = opened_interface(d, 4, n, 5), Windows((G * n,), (n,))
    reader, writer = interface.reader, interface.writer
    s, c = torch.randn(B, G * n, d).double(), torch.randn(B, d).double()
    group_of_token, group_of_latent = torch.arange(G * n) // n, torch.arange(G * kept) // kept
    allowed = group_of_latent[:, None] == group_of_token

    shift1, scale1, gate1, shift2, scale2, gate2 = reader.modulation.linear(torch.nn.functional.silu(c)).chunk(6, -1)
    position = interface.position.repeat(G, 1)
    latents = interface.latents[:kept].repeat(G, 1).expand(B, -1, -1)
    queries = reader.norm_latents(latents) * (1 + scale1[:, None]) + shift1[:, None]
    x = latents + gate1[:, None] * dense(reader.attention, queries, reader.norm_tokens(s + position), allowed)
    x = x + gate2[:, None] * reader.mlp(reader.norm_mlp(x) * (1 + scale2[:, None]) + shift2[:, None])
    assert torch.allclose(interface.read(s, c, windows, kept), x, atol=1e-10)

    queries = writer.norm_tokens(s + position)
    y = s + dense(writer.attention, queries, writer.norm_latents(x), allowed.T)
    y = y + writer.mlp(writer.norm_mlp(y))
    assert torch.allclose(interface.write(s, x, windows, kept), y, atol=1e-10)


def test_attention_weights_are_those_of_the_forward():
    interface = opened_interface()
    attention = interface.reader.attention
    q, context = torch.randn(2, 5, 32).double(), torch.randn(4, 6, 32).double()
    weights, (_, _, v) = attention.weights(q, context), attention.project(q, context)
    assert torch.allclose(attention.proj((weights @ v).transpose(1, 2).flatten(2)), attention(q, context))


def test_latents_carry_slot_and_group():
    positions = Windows((8, 12), (4, 4)).coordinates(2)
    assert positions.shape == (12, 3)
    assert positions[:4].tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 1], [1, 0, 1]]
    assert positions[-1].tolist() == [1, 1, 2]


def test_interface_starts_closed():
    """Before training, Write adds nothing: the output is the same at every budget."""
    model = opened("elit-dit")
    fresh = LatentInterface(48, 4, (4, 4), 16)
    for module in fresh.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight)
    fresh.initialize()
    for linear in (fresh.writer.attention.proj, fresh.writer.mlp.fc2):
        torch.nn.init.zeros_(linear.bias)
    model.latent_interface = fresh
    x, t, y = inputs(model)
    s = torch.randn(3, 64, 48)
    assert torch.equal(fresh.write(s, torch.randn(3, 32, 48), Windows((8, 8), (4, 4)), 8), s)
    assert torch.equal(model(x, t, y, 1), model(x, t, y))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"split": (1, 0, 1)}, r"split must be .* got \(1, 0, 1\)"),
        ({"window": (0, 4)}, r"window must be .* got \(0, 4\)"),
        ({"num_latents": 0}, "num_latents must be at least 1, got 0"),
    ],
)
def test_spec_names_what_is_wrong(wrong, message):
    with pytest.raises(ValueError, match=message):
        InterfaceSpec(**{"split": (1, 2, 1), "window": (4, 4), "num_latents": 4} | wrong)


@pytest.mark.parametrize("size", [None, (20, 16)])
def test_flops_are_counted_without_gradients_too(elit_model, size):
    """torch's counter tracks modules, and asks arguments that need a gradient for their function."""
    if size and not (len(elit_model.sample_size) == 2 and elit_model.cell == elit_model.patch_size):
        size = None
    x, t, y = inputs(elit_model, 1, size)
    counted = []
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), FlopCounterMode(display=False) as counter:
            elit_model(x, t, y, elit_model.budgets[0])
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0
