"""All of `elit inspect` on small networks of every kind: its numbers add up, its files are there."""

import json
import math

import pytest
import torch
from conftest import conditions, opened, small_vae
from PIL import Image

from elit.data.encode import Encoding, encode
from elit.data.images import LatentSet, posterior_sample
from elit.data.source import open_source
from elit.evaluate.inspect.attention import Probe, losses, read_maps
from elit.evaluate.inspect.inspection import PICTURES, as_pictures, inspect_model, load_probe
from elit.sampling.autoencoders import decode
from elit.sampling.sample import sample, seeded_noise
from elit.sampling.settings import Sampling

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["elit-hdit", "elit-mmdit", "elit-dit-video"])  # test_probe.py has the others
def test_the_numbers_are_those_of_the_parts(kind, tmp_path):
    elit_model, ticks = opened(kind), []
    x = torch.randn(4, 4, *elit_model.sample_size, generator=torch.Generator().manual_seed(3))
    names, origin = ("a", "b", "a", "a long name that goes on and on"), {"data": "noise"}
    probe = Probe(x=x, y=conditions(elit_model, 4), times=(0.2, 0.8), draws=1, names=names, origin=origin)
    progress = lambda done, total: ticks.append((done, total))  # noqa: E731
    numbers = inspect_model(elit_model, probe, Sampling(steps=2, seed=5), tmp_path, progress=progress)
    assert ticks == [(i + 1, len(ticks)) for i in range(len(ticks))]
    assert {path.name for path in tmp_path.iterdir()} == {*PICTURES, "inspect.json"}
    assert all(min(Image.open(tmp_path / name).size) > 200 for name in PICTURES)
    assert json.loads((tmp_path / "inspect.json").read_text()) == json.loads(json.dumps(numbers))

    full, first = losses(elit_model, probe), losses(elit_model, probe, elit_model.budgets[0])
    assert numbers["budgets"][0]["loss"] == pytest.approx(first.mean().item())
    increase = (first - full).mean(0)
    assert numbers["budgets"][0]["increase"] == pytest.approx(increase.mean().item())
    assert numbers["budgets"][0]["standard_error"] == pytest.approx(increase.std().item() / math.sqrt(4))
    assert numbers["budgets"][-1]["increase"] == 0
    least = sample(elit_model, probe.y[torch.tensor([0, 3, 1])], steps=2, budget=elit_model.budgets[0], seed=5)
    whole = sample(elit_model, probe.y[torch.tensor([0, 3, 1])], steps=2, seed=5)
    rms = (least - whole).square().mean().sqrt().item()
    assert numbers["samples"][-1]["rms_to_full"] == pytest.approx(rms, rel=1e-5)
    row = numbers["attention_and_loss"][1]
    assert row["loss"] == pytest.approx(full[1].mean().item(), rel=1e-5)
    assert row["spearman"]["mean"] == pytest.approx(read_maps(elit_model, probe).correlation()[1].mean().item())


def test_examples_of_pictures_and_of_latents_go_through_the_autoencoder(tmp_path):
    model, vae = opened("elit-dit"), small_vae()
    for i in range(4):
        (tmp_path / f"class {i % 2}").mkdir(exist_ok=True)
        pixels = torch.randint(0, 256, (40, 50, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"class {i % 2}" / f"{i}.png")
    found = load_probe(model, str(tmp_path), 4, vae=vae)
    assert found.names == ("class 0", "class 0", "class 1", "class 1")
    assert found.y.tolist() == [0, 0, 1, 1]
    shown = as_pictures(found.x, vae)
    assert torch.allclose(shown, decode(vae, found.x).clamp(-1, 1), atol=1e-5)
    with pytest.raises(ValueError, match=r"samples of \(4, 16, 16\) for this model, got \(3, 16, 16\); give vae"):
        load_probe(model, str(tmp_path), 4)
    with pytest.raises(ValueError, match="cannot encode data of 1 channels"):
        load_probe(model, "digits", 4, vae=vae)
    # Latents that elit encode has written are moments: samples are drawn from their posteriors.
    out = tmp_path / "latents"
    encode(open_source(tmp_path, captions=False), out, vae, Encoding(vae="small", image_size=32))
    found = load_probe(model, str(out), 3, vae=vae, seed=1)
    assert found.origin == {"data": str(out), "rows": [0, 1, 2], "posterior_seed": 1}
    moments, labels = LatentSet(out).__getitems__([0, 1, 2])
    assert torch.equal(found.x, posterior_sample(moments, seeded_noise([1, 2, 3], (4, 16, 16))))
    assert torch.equal(found.y, labels)
