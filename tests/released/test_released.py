"""Published checkpoints: their formats against plain loops over the spec, and files that are none."""

import argparse
import json
import os
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from released_files import ELIT, READ, checkpoint, network, sampler, weights
from safetensors.torch import load_file

import elit
from elit.cli.main import main
from elit.elastic.load import load_model
from elit.sampling.sample import sample, seeded_noise

pytestmark = pytest.mark.slow

SIZES = {"num_heads": 2, "tail_blocks": 1}
STEPS = 3
BUDGETS = (1.0, 0.5, 0.0625)
# Guidance of the published sampler: w, t low to high, and what the weak branch is given.
GUIDED = {
    "none": (1.0, 0.0, 1.0, None),
    "cfg": (2.5, 0.0, 1.0, elit.CFG(2.5)),
    "ag": (2.5, 0.0, 1.0, elit.AG(2.5, 0.0625)),
    "ccfg": (2.5, 0.0, 1.0, elit.CCFG(2.5, 0.0625)),
    "interval": (1.8, 0.0, 0.7, elit.CFG(1.8, interval=(1 - 0.7, 1.0))),
}


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def saved(path: Path, content) -> Path:
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("released") / "elit.pt", checkpoint(ELIT))


@pytest.fixture
def given() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return seeded_noise([0, 1, 2], (4, 16, 16)), torch.tensor([0.0, 0.37, 1.0]), torch.tensor([3, 0, 7])


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("ema", [True, False])
def test_elit_sit_says_what_the_authors_network_says(released, given, budget, ema):
    x, t, y = given
    model = elit.load_released(released, **SIZES, ema=ema)
    expected = network(checkpoint(ELIT)["ema" if ema else "model"], ELIT, x, t, y, budget)
    assert (model(x, 1 - t, y, budget=budget) + expected).abs().max() < 1e-4
    assert expected.abs().max() > 1


@pytest.mark.parametrize(
    ("guide", "heun"),
    [("cfg", False), ("ag", False), ("ccfg", False), ("interval", False), ("none", True), ("interval", True)],
)
def test_sampling_is_the_published_sampler(released, guide, heun):
    """Their state is float64, ours float32: no matter at 1e-4."""
    w, low, high, guidance = GUIDED[guide]
    state, z, labels = checkpoint(ELIT)["ema"], seeded_noise([5, 6], (4, 16, 16)), torch.tensor([2, 4])
    budget = 0.5

    def velocity(x, t, weak):
        y = torch.full_like(labels, 7) if weak and guide != "ag" else labels
        kept = 0.0625 if weak and guide in ("ag", "ccfg") else budget
        return network(state, ELIT, x, torch.full((2,), t), y, kept)

    expected = sampler(velocity, z, STEPS, w=w, low=low, high=high, heun=heun)
    settings = {"steps": STEPS, "budget": budget, "guidance": guidance, "solver": "heun" if heun else "euler"}
    found = sample(elit.load_released(released, **SIZES), labels, noise=z, **settings)
    assert (found - expected).abs().max() < 1e-4


def test_import_saves_a_model_that_loads_to_the_same_numbers(released, given, tmp_path, capsys):
    x, t, y = given
    sizes = ["--num-heads", "2", "--tail-blocks", "1"]
    assert main(["import", str(released), str(tmp_path / "out"), *sizes, "--json"]) == 0
    *_, note, result = capsys.readouterr().out.splitlines()
    assert "non-commercial" in note
    assert json.loads(result)["budgets"] == list(range(1, 17))
    model, again = elit.load_released(released, **SIZES), load_model(tmp_path / "out")
    assert (type(again), again.training, model.training) == (elit.SiT, False, False)
    for budget in BUDGETS:
        assert torch.equal(again(x, t, y, budget), model(x, t, y, budget))
    (tmp_path / "keep.txt").write_text("mine")
    assert main(["import", str(released), str(tmp_path), *sizes, "--overwrite"]) == 2
    assert "it holds no saved model" in capsys.readouterr().err
    assert (tmp_path / "keep.txt").read_text() == "mine"


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_the_original_sit(given, tmp_path, double, wrapped):
    x, t, y = given
    state = weights(ELIT, elit=False, double=double)
    args = argparse.Namespace(model="SiT-XL/2", path_type="Linear", prediction="velocity")
    content = {"model": state, "ema": state, "opt": {}, "args": args} if wrapped else OrderedDict(state)
    kind = None if wrapped else "sit"
    model = elit.load_released(saved(tmp_path / "sit.pt", content), kind=kind, num_heads=2)
    assert (model(x, t, y) - network(state, ELIT, x, t, y)[:, :4]).abs().max() < 1e-4
    content = checkpoint(ELIT, elit=False)  # the baseline of ELIT's authors: their times and signs
    model = elit.load_released(saved(tmp_path / "sit.pt", content), num_heads=2)
    assert model.budgets == ()
    assert (model(x, 1 - t, y) + network(content["ema"], ELIT, x, t, y)).abs().max() < 1e-4


def test_the_original_dit_takes_steps_of_ddim(given, tmp_path):
    """An Euler step between two of DDPM's noise levels is DDIM's, in other units: x_s = X_t / √(t² + (1 − t)²)."""
    x, _, y = given
    state = weights(ELIT, elit=False, double=True)
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
    model = elit.load_released(saved(tmp_path / "dit.pt", state), kind="dit", num_heads=2)
    for step, after in ((900, 700), (500, 250), (40, 3)):
        t, t_after = (1 / (1 + sigma[i] / alpha[i]) for i in (step, after))
        noise = network(state, ELIT, x, torch.full((3,), float(step)), y)[:, :4].double()
        data = (x - sigma[step] * noise) / alpha[step]
        ddim = alpha[after] * data + sigma[after] * noise
        unit, unit_after = ((each**2 + (1 - each) ** 2) ** 0.5 for each in (t, t_after))
        here = x * unit
        velocity = model(here.float(), t.float().expand(3), y).double()
        euler = (here + (t_after - t) * velocity) / unit_after
        assert (euler - ddim).abs().max() < 2e-3 * ddim.abs().max()
    images = sample(model, [0, 1], steps=4, guidance=elit.CFG(1.5))
    assert images.isfinite().all()


class Mischief:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def without(content: dict, key: str) -> dict:
    return {name: value for name, value in content.items() if name != key}


def ema_with(**changed) -> dict:
    content = checkpoint(ELIT)
    return content | {"ema": content["ema"] | {name.replace("__", "."): value for name, value in changed.items()}}


ONE = torch.zeros(1)
WRONG = {
    "missing key": (
        lambda: checkpoint(ELIT) | {"ema": without(checkpoint(ELIT)["ema"], f"{READ}.learned_query_embed")},
        "missing weights: 1, the first is 'input_token_editor.adapters.0.learned_query_embed'",
    ),
    "extra key": (lambda: ema_with(head__weight=ONE), "unknown weights: 1, the first is 'head.weight'"),
    "no ema": (lambda: without(checkpoint(ELIT), "ema"), "entry 'ema' is missing"),
    "other args": (lambda: checkpoint(ELIT) | {"args": {"model": "ELIT"}}, "entries 'ema' and 'args' must be"),
    "shape": (lambda: ema_with(blocks__0__attn__proj__bias=ONE), r"proj.bias' has shape \(1,\), expected \(48,\)"),
    "axes": (lambda: ema_with(x_embedder__proj__weight=ONE), r"proj.weight' has shape \(1,\), expected 4 axes"),
    "positions": (lambda: ema_with(pos_embed=torch.zeros(1, 64, 48)), "'pos_embed' is not the fixed sin-cos table"),
    "qk_norm": (lambda: checkpoint(ELIT, qk_norm=True), "trained with qk_norm=True"),
    "prediction": (lambda: checkpoint(ELIT, prediction="x"), "trained with prediction='x'"),
    "window": (lambda: checkpoint(ELIT, elit_group_size="4"), "elit_group_size='4', encoder_depth=1"),
    "odd window": (lambda: checkpoint(ELIT, elit_group_size=3), "sample_size"),
    "a list": (lambda: [ONE], "holds no weights by name"),
    "bare": (lambda: weights(ELIT, elit=False), "indistinguishable; kind must be sit or dit"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_file_is_one_clear_line(fault, tmp_path, capsys):
    make, message = WRONG[fault]
    path = saved(tmp_path / "wrong.pt", make())
    with pytest.raises(ValueError, match=message) as failed:
        elit.load_released(path, **SIZES)
    assert "\n" not in str(failed.value)
    assert main(["import", str(path), str(tmp_path / "out"), "--num-heads", "2", "--tail-blocks", "1"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["args", "opt", "ema"])
def test_another_class_is_refused_and_not_run(place, zipped, tmp_path, capsys):
    content = checkpoint(ELIT)
    content[place] = Mischief(tmp_path / "done")
    torch.save(content, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
    assert main(["import", str(tmp_path / "evil.pt"), str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"holds posix\.mkdir, which is not a weight; not loaded, nothing was run", line)
    assert not (tmp_path / "done").exists()
    assert not (tmp_path / "out").exists()


def test_a_truncated_or_other_file_is_one_clear_line(released, tmp_path):
    whole = released.read_bytes()
    (tmp_path / "old.pt").write_bytes(b"")
    torch.save(checkpoint(ELIT), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    old = (tmp_path / "old.pt").read_bytes()
    parts = [data[: len(data) * i // 8] for data in (whole, old) for i in range(8)]
    parts += [old.replace(b"storage", b"garbage"), old.replace(b"x_embedder", b"x_\xff\xffbedder")]
    parts += [whole[:-1], old[:-1], whole[1:], b"PK\x03\x04", b"a page about a missing file", os.urandom(4096)]
    for part in parts:
        (tmp_path / "part.pt").write_bytes(part)
        with pytest.raises(ValueError, match=r"part.pt'.*: truncated, damaged or not a torch checkpoint") as failed:
            elit.load_released(tmp_path / "part.pt", **SIZES)
        assert "\n" not in str(failed.value)
    with pytest.raises(ValueError, match="no such file"):
        elit.load_released(tmp_path)


FOLDER = os.environ.get("ELIT_RELEASED_CHECKPOINT")


@pytest.mark.skipif(not FOLDER, reason="ELIT_RELEASED_CHECKPOINT: no folder of NAME.pt, .json, _expected.safetensors")
def test_every_stored_output_and_sample():
    files = sorted(Path(str(FOLDER)).glob("*.json"))
    assert files
    for file in files:
        about = json.loads(file.read_text(encoding="utf-8"))
        stored = load_file(file.with_name(f"{file.stem}_expected.safetensors"))
        sizes = {name: about[name] for name in ("num_heads", "tail_blocks")}
        model = elit.load_released(file.with_suffix(".pt"), **sizes)
        for key, expected in stored.items():
            if re.match("out_|sample_", key):
                assert (_answer(model, key, stored, about) - expected).abs().max() < 1e-4, (file.stem, key)


def _answer(model: elit.SiT, key: str, stored: dict, about: dict) -> torch.Tensor:
    if key.startswith("out_budget_"):
        return -model(stored["x"], 1 - stored["t"], stored["y"], budget=float(key.removeprefix("out_budget_")))
    scale, low = about["cfg_scale"], about["unconditional_budget"]
    settings = {"steps": about["sampler_steps"], "noise": stored["z"]}
    if key == "sample_heun_interval":
        own = about["heun_interval"]
        interval = (1 - own["guidance_high"], 1 - own["guidance_low"])
        guided = {"guidance": elit.CFG(own["cfg_scale"], interval=interval), "budget": own["budget"], "solver": "heun"}
        return sample(model, stored["labels"], **settings, **guided)
    guide = {"cfg": elit.CFG(scale), "ag": elit.AG(scale, low), "ccfg": elit.CCFG(scale, low)}
    return sample(model, stored["labels"], **settings, guidance=guide[key.removeprefix("sample_")])
