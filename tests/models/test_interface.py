"""Layers, windows, the interface and SiT against plain loops, dense attention, einops and closed forms."""

import copy
import math
from collections import Counter
from itertools import product
from math import prod

import einops
import pytest
import torch
from conftest import inputs, opened
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import elit
from elit.models.interface import LatentInterface
from elit.models.layers import SHORT_CPU_SEQUENCE, Rope, attend, patchify, rope_tables, unpatchify
from elit.models.presets import create_model
from elit.models.sit import ddpm_time
from elit.models.windows import Windows


def opened_interface(width=32, heads=4, n=6, latents=5) -> LatentInterface:
    torch.manual_seed(0)
    interface = LatentInterface(width, heads, (n,), latents, condition_width=width)
    for parameter in interface.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return interface.double()


def dense(attention, queries, context, allowed):
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


SIZES = {"elit-dit": (22, 14), "elit-uvit": (10, 24), "elit-hdit": (22, 14), "elit-dit-video": (3, 10, 6)}


def cut(length: int, side: int) -> list[range]:
    parts = -(-length // side)
    return [range(part * length // parts, (part + 1) * length // parts) for part in range(parts)]


CUTS = [*product([(83, 83), (21, 58), (8, 5), (1, 52), (3, 7)], [(8, 8), (2, 4), (3, 8)]), ((21, 6, 5), (2, 4, 4))]


@pytest.mark.parametrize(("grid", "window"), CUTS)
def test_axes_are_cut_as_equally_as_possible(grid, window):
    boxes = list(product(*(cut(length, side) for length, side in zip(grid, window, strict=True))))
    boxes.sort(key=lambda box: (-prod(map(len, box)), *map(len, box)))
    windows = Windows(grid, window)
    assert windows.coordinates().tolist() == [list(place) for box in boxes for place in product(*box)]
    assert dict(windows.shapes) == Counter(tuple(map(len, box)) for box in boxes)
    raster = torch.tensor(list(product(*map(range, grid))), dtype=torch.float32)
    assert torch.equal(windows.coordinates(), raster[windows.order])
    assert torch.equal(raster[windows.order][windows.inverse], raster)


def test_a_smaller_window_keeps_the_same_share_and_at_least_one():
    assert [Windows((7, 7), (8, 8)).latents(kept)[0] for kept in (64, 32, 16, 1)] == [49, 25, 12, 1]
    assert [Windows((2, 3), (4, 4), 4).latents(kept)[0] for kept in (16, 8, 4)] == [8, 4, 4]


@pytest.mark.parametrize("kept", [6, 3, 1])
def test_read_and_write_are_those_of_each_window_alone(kept):
    torch.manual_seed(0)
    grid, window = (5, 7), (2, 3)
    interface = LatentInterface(32, 4, window, 6, condition_width=32).double()
    for parameter in interface.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    windows = Windows(grid, window)
    image, c = torch.randn(2, *grid, 32).double(), torch.randn(2, 32).double()
    tokens = image.flatten(1, 2)[:, windows.order]
    latents = interface.read(tokens, c, windows, kept)
    written = interface.write(tokens, latents, windows, kept)
    place, slot = interface.position.view(*window, 32), 0
    before = 0
    for rows, columns in sorted(product(cut(5, 2), cut(7, 3)), key=lambda box: -len(box[0]) * len(box[1])):
        box = image[:, rows.start : rows.stop, columns.start : columns.stop].flatten(1, 2)
        position = place[: len(rows), : len(columns)].flatten(0, 1)
        count = max(1, round(kept * box.shape[1] / 6))
        alone = interface.reader(interface.latents[:count], box + position, c)
        torch.testing.assert_close(latents[:, slot : slot + count], alone)
        back = interface.writer(box, position, alone)
        torch.testing.assert_close(written[:, before : before + box.shape[1]], back)
        slot, before = slot + count, before + box.shape[1]
    assert (slot, before) == (latents.shape[1], 35)


@pytest.mark.parametrize("kind", SIZES)
def test_a_trained_network_runs_at_sizes_that_do_not_divide(kind):
    model = opened(kind)
    x, t, y = inputs(model)
    x = torch.randn(2, x.shape[1], *SIZES[kind])
    t, y = t[:2], y[:2]
    low = model.budgets[0]
    with torch.no_grad():
        right = model(x, t, y)
        assert right.shape == x.shape
        assert not torch.equal(model(x, t, y, low), right)
    for budget in (None, low):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(x[:1], t[:1], y[:1], budget)
        assert counter.get_total_flops() == elit.count_flops(model, sample_size=SIZES[kind], budget=budget)
    with torch.no_grad():
        model.latent_interface.latents[low:] = torch.nan
        assert model(x, t, y, low).isfinite().all()


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
