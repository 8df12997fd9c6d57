"""The interface against dense attention, and the tail drop against truncation and NaN."""

import pytest
import torch

from elit.models.interface import LatentInterface
from elit.models.windows import Windows


def opened_interface(width=32, heads=4, n=6, latents=5) -> LatentInterface:
    torch.manual_seed(0)
    interface = LatentInterface(width, heads, (n,), latents, condition_width=width)
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
    mixed = (weights @ v.transpose(1, 2)).transpose(1, 2).flatten(2)
    assert torch.allclose(attention.proj(mixed), attention(q, context))


def test_latents_carry_slot_and_group():
    positions = Windows((8, 12), (4, 4)).coordinates(2)
    assert positions.shape == (12, 3)
    assert positions[:4].tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 1], [1, 0, 1]]
    assert positions[-1].tolist() == [1, 1, 2]
