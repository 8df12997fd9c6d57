"""The network as a sampler runs it: dtype copies and compiled twins leave the network itself alone."""

import copy

import peft
import pytest
import torch
from conftest import fresh, opened
from peft.tuners.tuners_utils import BaseTunerLayer
from torch._dynamo.utils import counters

from elit.flow.guidance import AG, CCFG, CFG
from elit.sampling.engine import as_compiled, in_dtype
from elit.sampling.sample import sample

pytestmark = pytest.mark.slow


def shallow():
    """Read, one block, Write: tracing sizes that are all dynamic takes seconds a block."""
    return opened("elit-dit", depth=1, split=(0, 1, 0))


def test_compiled_samples_are_the_same_and_three_graphs_serve_all_budgets(monkeypatch):
    """One for any J̃, one for a single latent a group; both branches of guidance are one call, so one more."""
    graphs = []
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, *_, **__: graphs.append(graph) or graph)
    torch._dynamo.reset()
    counters.clear()
    model = shallow()
    before = set(vars(model))

    def check(**settings):
        compiled = sample(model, [0, 1], steps=1, compile=True, **settings)
        torch.testing.assert_close(compiled, sample(model, [0, 1], steps=1, **settings), rtol=0, atol=1e-5)

    for budget in (16, 1, 6, 11, 16):
        check(budget=budget)
    assert len(graphs) == 2
    for budget in (2, 7, 16):
        check(budget=budget, guidance=AG(2.0, 1))
    assert len(graphs) == 3
    assert not counters["graph_break"]
    assert set(vars(model)) == before
    assert model._compiled_call_impl is None
    assert as_compiled(model) is as_compiled(model)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_of_several_budgets_do_not_write_over_each_other():
    model = fresh("elit-dit").cuda()
    for budget in (16, 4, 16, 1, 4):
        settings = {"steps": 4, "budget": budget}
        compiled = sample(model, [0, 1], compile=True, **settings)
        torch.testing.assert_close(compiled, sample(model, [0, 1], **settings), rtol=0, atol=1e-4)


def with_adapters(model):
    """Two LoRAs of random weights on its MLPs, of which the first is active."""
    settings = {"r": 2, "target_modules": ["fc1"], "init_lora_weights": False}
    for name in ("one", "two"):
        torch.manual_seed(len(name) + (name == "two"))
        peft.inject_adapter_in_model(peft.LoraConfig(**settings), model, name)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.set_adapter("one")
    return layers


CHANGES = {
    "data": lambda layer: layer.weight.data.mul_(2),
    "switch": lambda layer: layer.set_adapter("two"),
    "off": lambda layer: layer.enable_adapters(False),
    "merge": lambda layer: layer.merge(),
    "scale": lambda layer: layer.scale_layer(3.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_copy_follows_what_leaves_no_trace_on_the_weights(change):
    """Writes through .data, and adapters switched, merged and scaled: as a network copied on the spot."""
    model = opened("elit-dit")
    layers = with_adapters(model)
    x, t, y = torch.randn(2, 4, 16, 16), torch.rand(2), torch.tensor([0, 1])
    with torch.inference_mode():
        first = in_dtype(model, torch.bfloat16)
        before = first(x.bfloat16(), t, y)
    for layer in layers:
        change(layer)
    with torch.no_grad():
        after = in_dtype(model, torch.bfloat16)(x.bfloat16(), t, y)
        right = copy.deepcopy(model).to(torch.bfloat16).eval()(x.bfloat16(), t, y)
    assert torch.equal(after, right)
    assert (in_dtype(model.train(), torch.bfloat16) is first) == (change is CHANGES["data"])
    assert change is CHANGES["merge"] or not torch.equal(after, before)  # merging changes where the sum is, in bfloat16


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"guidance": CFG(1.5)}, [16]),
        ({"guidance": CCFG(1.5, 1)}, [16, 1]),
        ({"guidance": CFG(1.5), "budget": 8}, [8]),
        ({"sample_budgets": [8, 8]}, [8]),
        ({"sample_budgets": [8, 1], "guidance": CFG(1.5)}, [8, 1, 8, 1]),
    ],
)
def test_equal_budgets_are_handed_over_once_and_different_ones_are_compiled(settings, expected, monkeypatch):
    """torch 2.13's compiler takes equal numbers for one, and its code asks for the one that is gone."""
    model, seen, compiled = opened("elit-dit"), [], []
    forward = type(model).forward

    def watched(self, *args, **options):
        seen.append(args[3])
        return forward(self, *args, **options)

    monkeypatch.setattr(type(model), "forward", watched)
    monkeypatch.setattr("elit.sampling.engine.as_compiled", lambda network: compiled.append(network) or network)
    sample(model, [0, 1], steps=1, compile=True, **settings)
    assert seen == [expected]
    assert bool(compiled) == (expected != [8, 1, 8, 1])
