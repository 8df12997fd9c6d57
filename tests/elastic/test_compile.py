"""torch.compile on top: what Read and Write do runs between graphs, the numbers stay, and budgets share graphs."""

import pytest
import torch
from conftest import opened
from tiny import build, inputs
from torch._dynamo.utils import counters

import elit

pytestmark = pytest.mark.slow

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


def test_compiled_blocks_give_the_same():
    model, x = elastic("DiT")
    right = {}
    with torch.no_grad():
        for compiling in (False, True):
            if compiling:
                model.compile_repeated_blocks(backend="eager")
            for kept in (16, 4):
                with elit.budget(kept):
                    found = output(model(**x))
                assert torch.allclose(found, right.setdefault(kept, found), atol=1e-5)


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
