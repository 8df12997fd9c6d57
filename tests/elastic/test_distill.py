"""elit distill of this library's DiT, by one process and by two; and torch.compile on top of a dial."""

import json

import pytest
import torch
from commands import run_two
from conftest import opened
from PIL import Image
from safetensors.torch import load_file
from tiny import build, inputs, pipeline
from torch._dynamo.utils import counters

import elit
from elit.cli.main import main
from elit.config import DistillConfig, save_config
from elit.data.builtin import digits
from elit.elastic.distill import distill

pytestmark = pytest.mark.slow

SMALL = {"sample_size": 8, "in_channels": 1, "num_classes": 10, "hidden_size": 24, "num_heads": 2, "depth": 4}


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    made = elit.create_model("DiT-S/1", **SMALL)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def settings(saved, **changes):
    given = {"read_after": 1, "write_after": 3, "window": (4, 4), "mode": "learned", "batch_size": 16, "steps": 30}
    given |= {"learning_rate": 3e-3, "warmup_steps": 1, "distillation": 1000.0, "trackers": (), "data": "digits"}
    return DistillConfig(pipeline=str(saved), out=str(saved.parent / "out"), **given | changes)


@pytest.mark.parametrize("weights", ["all", "lora", "interface"])
def test_brings_low_budgets_closer(saved, weights):
    result = distill(settings(saved, weights=weights, lora_rank=2))
    row = next(row for row in result["validation"] if row["tokens"] == 4)
    assert row["distance"] < 0.95 * row["distance_before"]
    made, before = elit.load_elastic(result["model"]), elit.load_model(saved)
    own = dict(before.named_parameters())
    moved = {name for name, value in made.named_parameters() if name in own and not value.equal(own[name])}
    assert bool(moved) == made.elastic_record.changed == (weights == "all")
    assert made.elastic_record.lora_rank == (2 if weights == "lora" else 0)
    changes, parts = getattr(made.elastic, "low_rank", {}), ("attention-qkv", "attention-proj", "mlp-fc1", "mlp-fc2")
    assert set(changes) == {f"blocks-{i}-{part}" for i in range(4) for part in parts if weights == "lora"}
    assert all(change.up.weight.any() for change in changes.values())
    x, t, y = digits().images[:32], torch.linspace(0, 1, 32), digits().labels[:32]
    with torch.no_grad():
        assert torch.equal(made(x, t, y), before(x, t, y)) == (weights != "all")  # at full budget the original runs
        assert made(x, t, y, 1).isfinite().all()


def test_the_command_and_its_one_line_errors(saved, capsys):
    out = str(saved.parent / "out")
    words = ["distill", str(saved), out, "--data", "digits", "--window", "4", "4", "--steps", "2", "--batch-size", "8"]
    assert main([*words, "--read-after", "1", "--write-after", "3", "--lora-rank", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["tokens"] for row in told["validation"]] == [16, 8, 4, 2]
    assert elit.load_model(told["model"]).budgets == tuple(range(1, 17))
    for wrong, message in (
        ([*words[:3], "--window", "4", "4"], "data must be given for a network of this library"),
        ([*words[:3], "--data", "moving-digits"], "data must have samples of shape"),
        ([*words, "--budget-max", "16"], "<= budget_max <= 15, got 1 and 16"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipeline")
    pipeline("DiTPipeline").save_pretrained(root / "dit")
    (root / "prompts.txt").write_text("7\n8\n9\n10\n")
    for label in ("7", "8"):
        (root / "pictures" / label).mkdir(parents=True)
        for number in range(3):
            pixels = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(number))
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(root / "pictures" / label / f"{number}.png")
    return root


def of_two(folder, out, *, pictures, **changes):
    source = {"data": str(folder / "pictures")} if pictures else {"prompts": str(folder / "prompts.txt")}
    given = {"pipeline": str(folder / "dit"), "window": (4, 4), "steps": 8, "batch_size": 4, "teacher_steps": 2}
    given |= {"teacher_batch": 2, "preview_every": 0, "checkpoint_every": 2, "log_every": 1, "trackers": ()}
    given |= {"lora_rank": 2, "call": ("guidance_scale=1.0",), "learning_rate": 3e-3, "warmup_steps": 1}
    return DistillConfig(out=str(out), **source, **given | {"gradient_accumulation": 2} | changes)


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("sharded", [False, True], ids=["copied, trajectories", "sharded, pictures"])
def test_two_processes_match_one(folder, tmp_path, sharded):
    reference, out = tmp_path / "one", tmp_path / "run"
    distill(of_two(folder, reference, pictures=sharded))
    save_config(of_two(folder, out, pictures=sharded, fsdp=sharded), tmp_path / "config.yaml")
    run_two(["distill", "--config", str(tmp_path / "config.yaml")], tmp_path)
    assert losses(out) == pytest.approx(losses(reference), abs=1e-4)
    one, two = (load_file(each / "elastic.safetensors") for each in (reference, out))
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-4


SPLIT = {"read_after": 0, "write_after": 1, "window": (4, 4)}


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def elastic(kind):
    sizes = {"sample_size": 8, "in_channels": 1, "num_classes": 10, "hidden_size": 24, "num_heads": 2, "depth": 2}
    if kind == "DiT":
        model, x = elit.create_model("DiT-S/1", **sizes), {"x": torch.randn(2, 1, 8, 8)}
        x |= {"t": torch.tensor([0.2, 0.7]), "y": torch.tensor([1, 2])}
    else:
        model, x = build(kind, num_layers=2), inputs(kind) | {"return_dict": False}
    elit.elastify(model.eval(), **SPLIT)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, x


def output(result):
    return result[0] if isinstance(result, tuple) else result


def test_compiled_gives_the_same_outputs_and_gradients_at_every_budget():
    model, x = elastic("DiTTransformer2DModel")
    compiled = torch.compile(model, backend="aot_eager")  # graphs are what this is about, not what becomes of them
    counters.clear()
    for kept in (16, 8, 4, 7, 2, 1):
        found = []
        for run in (model, compiled):
            model.zero_grad()
            with elit.budget(kept):
                out = output(run(**x))
            out.square().sum().backward()
            found.append([out, *(p.grad for p in model.parameters() if p.grad is not None)])
        for theirs, ours in zip(*found, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        if kept == 4:  # the first lower budgets find that the number of tokens is dynamic
            seen = counters["stats"]["unique_graphs"]
        assert kept in (16, 8, 1) or counters["stats"]["unique_graphs"] == seen  # one token has graphs of its own


def test_a_network_that_gets_a_dial_between_two_compiled_samples_has_it(monkeypatch):
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, *_, **__: graph)
    model = opened("dit", depth=1)
    settings = {"steps": 1, "noise": torch.randn(1, 4, 16, 16)}
    plain = elit.sample(model, [0], compile=True, **settings)
    elit.elastify(model, **SPLIT)
    for parameter in model.elastic.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    compiled = elit.sample(model, [0], compile=True, budget=0.5, **settings)
    assert torch.allclose(compiled, elit.sample(model, [0], budget=0.5, **settings), atol=1e-5)
    assert not torch.allclose(compiled, plain, atol=1e-3)
