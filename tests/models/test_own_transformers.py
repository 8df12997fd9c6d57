"""The interface inside transformers of other people, and networks derived from those here."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import SETTINGS, conditions
from diffusers.models.attention import BasicTransformerBlock
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import elit
from elit.config import ModelConfig, TrainConfig
from elit.models import presets
from elit.models.layers import Block
from elit.models.windows import Windows
from elit.training.train import train

WIDTH, HEADS = 32, 4


class PlainBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class TimmBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gamma = nn.Parameter(0.1 * torch.ones(WIDTH))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).reshape(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.gamma * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        return x + self.gamma * self.mlp(self.norm2(x))


class DiTBlock(TimmBlock):
    def __init__(self):
        super().__init__()
        self.adaln = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x, c):
        shift, scale = self.adaln(F.silu(c))[:, None].chunk(2, -1)
        return super().forward(x * (1 + scale) + shift)


def blocks(kind):
    if kind == "torch":
        return nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, 0.0, batch_first=True, norm_first=True)
    own = {"plain": PlainBlock, "timm": TimmBlock, "dit": DiTBlock}
    return own[kind]() if kind in own else BasicTransformerBlock(WIDTH, HEADS, WIDTH // HEADS)


class Host(nn.Module):
    def __init__(self, kind, window, condition_width=None):
        super().__init__()
        self.kind, self.place = kind, nn.Linear(1 + len(window), WIDTH)
        self.head, *core, self.tail = (blocks(kind) for _ in range(4))
        self.core = nn.ModuleList(core)
        if kind == "torch":
            self.core = nn.TransformerEncoder(core[0], 2, enable_nested_tensor=False)
        self.interface = elit.LatentInterface(WIDTH, HEADS, window, 16, condition_width)

    def run_core(self, z, at, c):
        self.seen = at
        z = z + self.place(at)
        if self.kind == "torch":
            return self.core(z)
        for block in self.core:
            z = block(z, *c)
        return z

    def forward(self, s, c, grid, budget=None):
        own = [c] if self.kind == "dit" else []
        condition = None if self.interface.reader.modulation is None else c
        s = self.head(s, *own)
        core = lambda z, at: self.run_core(z, at, own)  # noqa: E731
        return self.tail(self.interface(s, core, grid=grid, condition=condition, budget=budget), *own)


KINDS = ("plain", "torch", "timm", "dit", "diffusers")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(8, 8), (9, 7), (3, 4, 6)])
def test_a_transformer_of_ones_own_has_the_dial(kind, grid):
    torch.manual_seed(0)
    host = Host(kind, (2, 4, 4)[-len(grid) :], WIDTH if kind == "dit" else None)
    s, c = torch.randn(2, math.prod(grid), WIDTH), torch.randn(2, WIDTH)
    optimizer = torch.optim.Adam(host.parameters(), lr=1e-2)
    for _ in range(3):  # Write opens in the first, adaLN-Zero in the second
        optimizer.zero_grad()
        loss = F.mse_loss(host(s, c, grid, 4), torch.zeros_like(s))
        loss.backward()
        used = {name for name, weight in host.named_parameters() if weight.grad is not None and weight.grad.any()}
        optimizer.step()
    windows = Windows(grid, host.interface.window)
    assert torch.equal(host.seen, windows.coordinates(4))
    assert len(host.seen) == sum(n * kept for (_, n), kept in zip(windows.shapes, windows.latents(4), strict=True))
    assert {"interface.latents", "interface.position", "interface.reader.attention.kv.weight", "place.weight"} <= used
    assert host.interface.latents.grad[0].any()
    assert not host.interface.latents.grad[4:].any()

    host.eval()
    with torch.no_grad():
        outputs = {budget: host(s, c, grid, budget) for budget in (None, 16, 4, 0.25, 1)}
        assert all(each.shape == s.shape and each.isfinite().all() for each in outputs.values())
        assert torch.equal(outputs[None], outputs[16])
        assert torch.equal(outputs[4], outputs[0.25])
        assert not torch.allclose(outputs[4], outputs[None])
        host.interface.latents[4:] = torch.nan
        assert torch.equal(host(s, c, grid, 4), outputs[4])


def test_it_compiles_whole():
    torch.manual_seed(0)
    torch.compiler.reset()
    host = Host("dit", (4, 4), WIDTH).eval()
    host.core = host.core[:1]
    compiled = torch.compile(host, fullgraph=True, backend="eager")
    s, c = torch.randn(2, 64, WIDTH), torch.randn(2, WIDTH)
    with torch.no_grad():
        for budget in (4, 9):
            assert torch.allclose(compiled(s, c, (8, 8), budget), host(s, c, (8, 8), budget), atol=1e-5)


@pytest.mark.parametrize("condition_width", [None, 24])
def test_a_fresh_interface_changes_nothing_and_learns(condition_width):
    """With a condition of zeros too, as of a network whose embedding starts at zero."""
    torch.manual_seed(0)
    interface = elit.LatentInterface(WIDTH, HEADS, (4, 4), 16, condition_width)
    s = torch.randn(2, 64, WIDTH)
    options = {"grid": (8, 8), "condition": None if condition_width is None else torch.zeros(2, condition_width)}
    with torch.no_grad():
        assert all(torch.equal(interface(s, lambda z, _: z, budget=b, **options), s) for b in (None, 0.5, 1))
    optimizer, losses, target = torch.optim.Adam(interface.parameters(), lr=1e-2), [], s.roll(1, 1)
    for _ in range(40):
        losses.append(F.mse_loss(interface(s, lambda z, _: z, budget=0.5, **options), target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert interface.reader.attention.kv.weight.grad.any()


def test_a_window_is_of_neighbours_in_raster_order():
    torch.manual_seed(0)
    interface = elit.LatentInterface(WIDTH, HEADS, (4, 4), 16)
    for parameter in interface.parameters():
        nn.init.normal_(parameter, std=0.2)
    s = torch.randn(1, 8, 12, WIDTH)
    moved = s.clone()
    moved[0, 5, 6] += 1  # of the second window of the second row
    before, after = (interface(each.flatten(1, 2), lambda z, _: z, grid=(8, 12)).view_as(s) for each in (s, moved))
    changed = (before != after).any(-1)[0]
    assert changed[4:, 4:8].all()
    assert changed.sum() == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"budget": budget}, "budget must be") for budget in (0, 17, 100, -1, 0.0, 1.5, float("nan"), "17")),
        ({"grid": (8, 7)}, r"grid must be the axes of the tokens, got \(8, 7\)"),
        ({"condition": torch.zeros(1, 8)}, "condition must be given exactly where"),
    ],
)
def test_what_does_not_fit_the_interface_is_named(options, message):
    interface = elit.LatentInterface(WIDTH, HEADS)
    with pytest.raises(ValueError, match=message):
        interface(torch.randn(1, 64, WIDTH), lambda z, _: z, **{"grid": (8, 8)} | options)


class ConvDiT(elit.DiT):
    def build(self):
        super().build()
        self.smooth = nn.Conv2d(self.config.in_channels, self.config.in_channels, 3, padding=1)

    def embed(self, x, windows):
        return super().embed(self.smooth(x), windows)


class GatedBlock(Block):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gate = nn.Parameter(torch.eye(sizes[0]))

    def forward(self, x, c, rope):
        return super().forward(x, c, rope) @ self.gate


class GatedDiT(elit.DiT):
    block = GatedBlock


def made(kind, settings):
    torch.manual_seed(0)
    sizes = {name: value for name, value in SETTINGS[settings][1].items() if name not in ("split", "window")}
    spec = elit.InterfaceSpec(split=(1, 2, 1), window=(4, 4), num_latents=16)
    return kind(**sizes, interface=spec if settings.startswith("elit") else None).eval()


@pytest.mark.parametrize("settings", ["dit", "elit-dit"])
@pytest.mark.parametrize("kind", [ConvDiT, GatedDiT])
def test_a_derived_network_is_saved_loaded_and_counted(tmp_path, kind, settings):
    model = made(kind, settings)
    model.save_pretrained(tmp_path)
    again = elit.load_model(tmp_path)
    assert type(again) is kind
    x, t, y = torch.randn(1, 4, 16, 16), torch.rand(1), conditions(model, 1)
    for budget in (None, *model.budgets[::5]):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            velocity = model(x, t, y, budget)
        assert elit.count_flops(model, budget=budget) == counter.get_total_flops()
        with torch.no_grad():
            assert torch.equal(again(x, t, y, budget), model(x, t, y, budget))
        assert velocity.isfinite().all()
    before = torch.random.get_rng_state()
    assert elit.count_flops(model, sample_size=32) > elit.count_flops(model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert elit.sample(again, [1], steps=2, seed=0).shape == (1, 4, 16, 16)


def test_a_registered_class_is_made_and_trained_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "FAMILIES", dict(presets.FAMILIES))
    elit.register_model("Gated-DiT", GatedDiT)
    try:
        assert {"Gated-DiT-S/2", "ELIT-Gated-DiT-XL/4"} <= set(elit.list_models())
        sizes = {"hidden_size": 16, "num_heads": 1, "depth": 3, "split": (1, 1, 1), "window": (4, 4)}
        settings = {"steps": 2, "batch_size": 4, "preview_every": 0, "trackers": ()}
        model = ModelConfig(name="ELIT-Gated-DiT-S/1", **sizes)
        trained = train(TrainConfig(model=model, out=str(tmp_path / "run"), **settings))
        assert type(trained) is type(elit.load_model(tmp_path / "run" / "model")) is GatedDiT
        assert trained.budgets == tuple(range(1, 17))
        for name in ("Gated-DiT", "DiT", "ELIT-Mine", "a/b"):
            with pytest.raises(ValueError, match="family must be a new name of letters, digits"):
                elit.register_model(name, GatedDiT)
    finally:
        presets.presets.cache_clear()


def test_a_network_whose_class_is_not_imported_is_refused(tmp_path):
    made(ConvDiT, "dit").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("ConvDiT", "NobodysDiT"))
    with pytest.raises(ValueError, match="or of an imported class of yours, not of a 'NobodysDiT'"):
        elit.load_model(tmp_path)


def test_a_class_of_a_known_name_does_not_take_its_place(tmp_path):
    class DiT(elit.DiT):
        pass

    elit.create_model("DiT-S/2", **SETTINGS["dit"][1]).save_pretrained(tmp_path)
    assert type(elit.load_model(tmp_path)) is elit.DiT
    assert DiT.__name__ == "DiT"
