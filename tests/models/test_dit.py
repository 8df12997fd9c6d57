"""DiT and ELIT-DiT as whole networks."""

import copy

import pytest
import torch
from conftest import SETTINGS, inputs, opened
from torch._dynamo.testing import CompileCounter

from elit.models.dit import DiT
from elit.models.presets import create_model


def loop_block(block, x, c, positions):
    """A transformer block in float64 with plain loops over samples, heads and tokens."""
    d, heads = x.shape[-1], block.attention.num_heads
    h = d // heads

    def norm(v):
        return (v - v.mean()) / (v.var(unbiased=False) + 1e-6).sqrt()

    def rms(v, weight):
        return v / (v.square().mean() + 1e-6).sqrt() * weight

    def turn(v, position):
        pairs, axes = h // 2, len(position)
        shares = [pairs // axes + (i >= axes - pairs % axes) for i in range(axes)]
        out, first = v.clone(), 0
        for share, coordinate in zip(shares, position, strict=True):
            for i in range(share):
                angle = torch.as_tensor(coordinate * 100 ** (-i / share)).double()
                a, b = v[first + i], v[first + i + pairs]
                out[first + i] = a * angle.cos() - b * angle.sin()
                out[first + i + pairs] = b * angle.cos() + a * angle.sin()
            first += share
        return out

    out = torch.empty_like(x)
    for b in range(len(x)):
        modulation = block.modulation.linear(c[b] / (1 + (-c[b]).exp()))
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.split(d)
        qkv = [block.attention.qkv(norm(token) * (1 + scale1) + shift1).split(d) for token in x[b]]
        mixed = torch.zeros_like(x[b])
        for head in range(heads):
            part = slice(head * h, (head + 1) * h)
            q = [
                turn(rms(q[part], block.attention.q_norm.weight), p)
                for (q, _, _), p in zip(qkv, positions, strict=True)
            ]
            k = [
                turn(rms(k[part], block.attention.k_norm.weight), p)
                for (_, k, _), p in zip(qkv, positions, strict=True)
            ]
            for i in range(len(q)):
                weights = torch.stack([q[i] @ key / h**0.5 for key in k]).exp()
                mixed[i, part] = sum(w * v[part] for w, (_, _, v) in zip(weights / weights.sum(), qkv, strict=True))
        for i, token in enumerate(x[b]):
            token = token + gate1 * block.attention.proj(mixed[i])
            hidden = block.mlp.fc1(norm(token) * (1 + scale2) + shift2)
            gelu = hidden / 2 * (1 + (torch.tensor(2 / torch.pi).sqrt() * (hidden + 0.044715 * hidden**3)).tanh())
            out[b, i] = token + gate2 * block.mlp.fc2(gelu)
    return out


@pytest.mark.parametrize("kind", ["dit", "dit-video"])
def test_block_against_plain_loops(kind):
    from elit.models.layers import Rope, rope_tables

    block = copy.deepcopy(opened(kind).blocks[0]).double()
    positions = torch.randint(0, 5, (6, 2 if kind == "dit" else 3)).float()
    x, c = torch.randn(2, 6, 48).double(), torch.randn(2, 48).double()
    rope = Rope(*(table.double() for table in rope_tables(positions, 12)))
    assert torch.allclose(block(x, c, rope), loop_block(block, x, c, positions.tolist()), atol=1e-6)


def test_output_has_the_shape_of_the_input(any_model):
    x, t, y = inputs(any_model)
    assert any_model(x, t, y).shape == x.shape
    assert any_model.budgets == (tuple(range(1, any_model.spec.num_latents + 1)) if any_model.spec else ())


def test_baseline_and_elit_share_their_weights():
    """The baseline is the same class: ELIT adds `latent_interface` and renames nothing."""
    plain, elastic = (opened(kind).state_dict() for kind in ("dit", "elit-dit"))
    added = set(elastic) - set(plain)
    assert set(plain) <= set(elastic)
    assert all(name.startswith("latent_interface.") for name in added)


def test_runs_at_a_larger_resolution(any_model):
    """One set of weights; the parts that see the small size do not change what a crop of tokens is."""
    larger = tuple(2 * length for length in any_model.sample_size)
    x, t, y = inputs(any_model, size=larger)
    out = any_model(x, t, y)
    assert out.shape == x.shape
    assert out.isfinite().all()
    rebuilt = type(any_model)(**{k: v for k, v in any_model.config.items() if k[0] != "_"} | {"sample_size": larger})
    rebuilt.load_state_dict(any_model.state_dict())
    assert torch.equal(rebuilt(x, t, y), out)


def test_every_parameter_gets_a_gradient_within_a_few_steps(any_model):
    name, settings = SETTINGS["elit-dit" if any_model.spec else "dit"]
    if len(any_model.sample_size) == 3:
        name, settings = SETTINGS["elit-dit-video" if any_model.spec else "dit-video"]
    model = create_model(name, **settings)  # the zero-initialised start of a real run
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, t, y = inputs(model, batch=4)
    reached: set[str] = set()
    for _ in range(5):
        optimizer.zero_grad()
        (model(x, t, y) - x.flip(0)).square().mean().backward()
        reached |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    assert reached == {n for n, _ in model.named_parameters()}


def test_each_part_of_a_batch_can_have_its_own_budget(elit_model):
    x, t, y = inputs(elit_model, batch=4)
    both = elit_model(x, t, y, (4, 1))
    assert torch.allclose(both[:2], elit_model(x[:2], t[:2], y[:2], 4), atol=1e-5)
    assert torch.allclose(both[2:], elit_model(x[2:], t[2:], y[2:], 1), atol=1e-5)
    with pytest.raises(ValueError, match="3 budgets do not divide a batch of 4"):
        elit_model(x, t, y, (1, 2, 3))


def test_gradient_checkpointing_changes_no_number(any_model):
    x, t, y = inputs(any_model)

    def gradients() -> list[torch.Tensor]:
        any_model.zero_grad()
        any_model(x, t, y).square().mean().backward()
        return [p.grad.clone() for p in any_model.parameters()]

    plain = gradients()
    any_model.enable_gradient_checkpointing()
    assert all(map(torch.equal, plain, gradients()))


def test_save_and_load_is_bit_exact(any_model, tmp_path):
    any_model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    loaded = DiT.from_pretrained(tmp_path)
    x, t, y = inputs(any_model)
    assert torch.equal(loaded(x, t, y), any_model(x, t, y))
    public = {k: v for k, v in any_model.config.items() if k[0] != "_"}
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == public


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_close_to_float32(any_model, autocast):
    x, t, y = inputs(any_model)
    with torch.no_grad():
        expected = any_model(x, t, y)
        if autocast:
            with torch.autocast("cpu", torch.bfloat16):
                out = any_model(x, t, y)
        else:
            out = any_model.to(torch.bfloat16)(x.bfloat16(), t, y)
    assert (out.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_forward_reads_nothing_back(any_model):
    """On the meta device there are no values: whatever syncs with the host fails here."""
    x, t, y = (value.to("meta") for value in inputs(any_model))
    assert any_model.to("meta")(x, t, y, 1 if any_model.budgets else None).shape == x.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_forward_on_cuda_does_not_sync_and_matches_the_cpu(any_model):
    x, t, y = inputs(any_model)
    expected = any_model(x, t, y)
    any_model.to("cuda")
    x, t, y = x.cuda(), t.cuda(), y.cuda()
    any_model(x, t, y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = any_model(x, t, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(out.cpu(), expected, atol=1e-3)


def test_compiles_without_breaks_and_twice_at_most():
    """One static and one dynamic graph serve all budgets but the smallest, which torch specialises on."""
    model = opened("elit-dit")
    x, t, y = inputs(model)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for budget in (16, 12, 8, 5, 2):
            assert torch.allclose(compiled(x, t, y, budget), model(x, t, y, budget), atol=1e-5)
    torch._dynamo.reset()
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (18, 16)}, r"sample_size=\(18, 16\).*nearest valid: 16 or 24 × 16"),
        ({"budget": 0}, "budget=0: give a number of latents per group"),
        ({"budget": 17}, "budget=17: .*1 to 16"),
        ({"budget": 1.5}, "budget=1.5"),
        ({"budget": "x"}, "budget='x'"),
        ({"budget": True}, "budget=True"),
        ({"y": 6}, "y=6: labels are 0 to 4, and 5 for no class"),
        ({"y": -1}, "y=-1"),
        ({"y": 0.5}, "y: dtype torch.float32"),
        ({"t": 1.25}, "t=1.25: times lie in"),
        ({"t": -0.5}, "t=-0.5"),
        ({"t": float("nan")}, "t=nan"),
        ({"channels": 3}, r"x: shape \(3, 3, 16, 16\), expected \(B, 4, H, W\)"),
        ({"batch": 2}, r"t: shape \(3,\), expected \(2,\)"),
    ],
)
def test_wrong_input_is_named(change, message):
    model = opened("elit-dit")
    x, t, y = inputs(model)
    x = torch.randn(change.get("batch", 3), change.get("channels", 4), *change.get("size", (16, 16)))
    t = torch.full((3,), change["t"]) if "t" in change else t
    y = torch.full((3,), change["y"]) if "y" in change else y
    with pytest.raises(ValueError, match=message):
        model(x, t, y, change.get("budget"))


def test_a_baseline_has_no_budget():
    model = opened("dit")
    with pytest.raises(ValueError, match=r"budget=0.5: this model has no latent interface"):
        model(*inputs(model), 0.5)
