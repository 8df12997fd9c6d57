"""Layers against index loops, plain loops in float64, einops and closed forms."""

import copy
import math

import einops
import pytest
import torch
from conftest import opened

from elit.models.layers import SHORT_CPU_SEQUENCE, Rope, attend, patchify, rope_tables, rotate, unpatchify
from elit.models.windows import Windows

CASES = [
    ((8, 12), (2, 2), (2, 3)),
    ((4, 4), (1, 1), (4, 4)),
    ((4, 8, 8), (1, 2, 2), (2, 2, 4)),
    ((2, 4, 4), (2, 1, 2), (1, 2, 1)),
]


@pytest.mark.parametrize(("size", "patch", "window"), CASES)
def test_patchify_against_einops(size, patch, window):
    """Windows in raster order, tokens in raster order inside, channels last; and the exact way back."""
    x = torch.randn(2, 3, *size)
    windows = Windows(tuple(length // p for length, p in zip(size, patch, strict=True)), window)
    if len(size) == 2:
        pattern = "b c (g1 w1 p1) (g2 w2 p2) -> b (g1 g2 w1 w2) (p1 p2 c)"
    else:
        pattern = "b c (g1 w1 p1) (g2 w2 p2) (g3 w3 p3) -> b (g1 g2 g3 w1 w2 w3) (p1 p2 p3 c)"
    lengths = {f"w{i + 1}": w for i, w in enumerate(window)} | {f"p{i + 1}": p for i, p in enumerate(patch)}
    tokens = patchify(x, patch, windows)
    assert torch.equal(tokens, einops.rearrange(x, pattern, **lengths))
    assert torch.equal(unpatchify(tokens, patch, windows), x)


@pytest.mark.parametrize("positions", [(3, 5), (3, 5, 1), (2, 3, 5, 1)])
def test_rope_against_complex_rotation(positions):
    pairs = 2 * len(positions)
    x = torch.randn(1, 1, 1, 2 * pairs)
    angles = torch.tensor([place * rate for place in positions for rate in (1, 100**-0.5)])
    turned = torch.complex(x[..., :pairs], x[..., pairs:]) * torch.polar(torch.ones(pairs), angles)
    expected = torch.cat((turned.real, turned.imag), -1)
    assert torch.allclose(rotate(x, rope_tables(torch.tensor([positions]).float(), 2 * pairs)), expected, atol=1e-6)


@pytest.mark.parametrize("length", [16, SHORT_CPU_SEQUENCE, SHORT_CPU_SEQUENCE + 1])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_attention_and_its_gradients_are_those_of_float64(length, autocast):
    draw = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, n, 2, 8, generator=draw).bfloat16() for n in (5, length, length)]
    grad = torch.randn(2, 5, 16, generator=draw).bfloat16()
    low = [part.clone().requires_grad_() for part in parts]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = attend(*low)
    out.backward(grad)
    q, k, v = exact = [part.double().requires_grad_() for part in parts]
    weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(8), -1)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
    expected.backward(grad.double())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02)
    for part, of_float64 in zip(low, exact, strict=True):
        torch.testing.assert_close(part.grad.double(), of_float64.grad, rtol=0.02, atol=0.02)


def loop_block(block, x, c, positions):
    """A transformer block in float64, samples and heads one by one."""
    d, heads, axes = x.shape[-1], block.attention.num_heads, positions.shape[1]
    pairs = d // heads // 2
    shares = [pairs // axes + (i >= axes - pairs % axes) for i in range(axes)]
    angles = [positions[:, i : i + 1] * 100.0 ** -(torch.arange(share) / share) for i, share in enumerate(shares)]
    angles = torch.cat(angles, 1).double()

    def norm(v):
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def turn(v, weight):
        v = v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        v = torch.complex(v[:, :pairs], v[:, pairs:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((v.real, v.imag), -1)

    out = []
    for tokens, condition in zip(x, c, strict=True):
        modulation = block.modulation.linear(condition / (1 + (-condition).exp()))
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.split(d)
        mixed = []
        qkv = block.attention.qkv(norm(tokens) * (1 + scale1) + shift1).split(d, -1)
        for q, k, v in zip(*(part.chunk(heads, -1) for part in qkv), strict=True):
            scores = turn(q, block.attention.q_norm.weight) @ turn(k, block.attention.k_norm.weight).T
            mixed.append((scores / (2 * pairs) ** 0.5).softmax(-1) @ v)
        tokens = tokens + gate1 * block.attention.proj(torch.cat(mixed, -1))
        hidden = block.mlp.fc1(norm(tokens) * (1 + scale2) + shift2)
        gelu = hidden / 2 * (1 + (torch.tensor(2 / torch.pi).sqrt() * (hidden + 0.044715 * hidden**3)).tanh())
        out.append(tokens + gate2 * block.mlp.fc2(gelu))
    return torch.stack(out)


@pytest.mark.parametrize("kind", ["dit", "dit-video"])
def test_block_against_plain_loops(kind):
    block = copy.deepcopy(opened(kind).blocks[0]).double()
    positions = torch.randint(0, 5, (6, 2 if kind == "dit" else 3)).float()
    x, c = torch.randn(2, 6, 48).double(), torch.randn(2, 48).double()
    rope = Rope(*(table.double() for table in rope_tables(positions, 12)))
    assert torch.allclose(block(x, c, rope), loop_block(block, x, c, positions), atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_more_windows_than_one_launch_takes(monkeypatch, masked):
    q, k, v = (torch.randn(13, 4, 2, 8, requires_grad=True) for _ in range(3))
    mask = torch.rand(13, 1, 1, 4) > 0.3 if masked else None
    whole = attend(q, k, v, mask)
    expected = torch.autograd.grad(whole.square().sum(), (q, k, v))
    monkeypatch.setattr("elit.models.layers.MAX_LAUNCH", 5)
    parts = attend(q, k, v, mask)
    assert torch.allclose(parts, whole, atol=1e-6)
    for a, b in zip(torch.autograd.grad(parts.square().sum(), (q, k, v)), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_70_000_windows_on_cuda(masked):
    q, k, v = (torch.randn(70_000, 4, 2, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    mask = torch.ones(70_000, 1, 1, 4, dtype=torch.bool, device="cuda") if masked else None
    whole = attend(q, k, v, mask)
    whole.float().square().sum().backward()
    assert torch.allclose(whole[-9:], attend(q[-9:], k[-9:], v[-9:]), atol=1e-2)
    assert q.grad.isfinite().all()
