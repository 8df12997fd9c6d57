"""Networks derived from those here in somebody else's module: saved, loaded, counted, trained."""

import pytest
import torch
from conftest import SETTINGS, conditions
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import elit
from elit.models.layers import Block


class ConvDiT(elit.DiT):
    """With a convolution before the blocks, which no closed form counts."""

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
