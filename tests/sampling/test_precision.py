"""Copies by dtype and compiled twins leave a network alone; steps that TeaCache does not evaluate."""

import copy
from dataclasses import replace

import peft
import pytest
import torch
from conftest import ELIT, conditions, fresh, opened
from peft.tuners.tuners_utils import BaseTunerLayer
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from elit.flow.guidance import AG, CCFG, CFG
from elit.flow.solver import time_grid
from elit.planner.choose import Plan
from elit.sampling.engine import as_compiled, in_dtype
from elit.sampling.evaluations import reused_steps, sampling_flops, sampling_plan, time_changes
from elit.sampling.sample import sample
from elit.sampling.settings import Sampling

pytestmark = pytest.mark.slow


def shallow():
    return opened("elit-dit", depth=1, split=(0, 1, 0))


def test_compiled_samples_are_the_same_and_three_graphs_serve_all_budgets(monkeypatch):
    """One for any J̃, one for a single latent a window; both branches of guidance are one call, so one more."""
    graphs = []
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, *_, **__: graphs.append(graph) or graph)
    torch._dynamo.reset()
    counters.clear()
    model = shallow()
    before = set(vars(model))

    def check(**settings):
        compiled = sample(model, [0, 1], steps=1, compile=True, **settings)
        torch.testing.assert_close(compiled, sample(model, [0, 1], steps=1, **settings), rtol=0, atol=1e-5)

    for budget, size in ((16, 16), (1, 16), (6, 24), (11, 32), (16, 16)):
        check(budget=budget, sample_size=size)
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


STEPS = 12


def asked(model, threshold, **settings):
    plan = sampling_plan(model, Sampling(steps=STEPS, cache=threshold, **settings))
    return [bool(chosen) for step in plan for chosen in step.values()]


TIMES = time_grid(STEPS)


def test_the_rule_by_hand():
    changes = [0.3, 0.3, 0.5, 0.1, 0.1, 0.1]
    # 0.3 and 0.6 stay below 1, 1.1 does not; then 0.1 and 0.2 do; the last step always asks.
    assert reused_steps(changes, [1] * 7, 1.0) == [False, True, True, False, True, True, False]
    assert reused_steps(changes, [1] * 7, 0.0) == [False] * 7
    assert reused_steps(changes, [2, 2, 1, 1, 1, 1, 1], 9.0) == [False, True, False, True, True, True, False]


def test_a_reused_step_has_the_velocity_of_the_last_evaluation():
    model = opened("elit-dit")
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    x, held = noise, None
    for step, ask in enumerate(asked(model, 2.5)):
        if ask:
            with torch.no_grad():
                held = model(x, torch.tensor([TIMES[step]]), torch.tensor([1]))
        x = x + (TIMES[step + 1] - TIMES[step]) * held
    torch.testing.assert_close(sample(model, [1], steps=STEPS, cache=2.5, noise=noise), x, rtol=0, atol=1e-5)


COUNTED = [
    {},
    {"guidance": CFG(2.0, interval=(0.0, 0.3)), "solver": "heun"},
    {"guidance": CCFG(2.0, 0.25), "cache": 2.5},
    {"guidance": AG(2.0, 0.25)},
    {"guidance": AG(2.0, 0.25), "cache": 2.5},
    {"step_budgets": [0.25, 0.5, 1.0]},
    {"sample_budgets": [1.0, 0.25], "guidance": CCFG(2.0, 0.25)},
]


@pytest.mark.parametrize("kind", ELIT)
def test_flops_are_those_of_the_evaluations(kind):
    """Autoguidance with one head for both branches, and steps that ask nothing, counted by torch; for a sample."""
    model = opened(kind).requires_grad_(False)  # the counter follows modules by the graph of gradients
    for each in COUNTED:
        settings, count, cache = {"steps": 3} | each, len(each.get("sample_budgets", [0])), "cache" in each
        y = conditions(model, count)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            sample(model, y, **settings)
        with FlopCounterMode(display=False) as times:  # the rule looks at the time embeddings once
            time_changes(model, time_grid(3)[:-1]) if cache else None
        expected = count * sampling_flops(model, **settings)
        tolerance = 0.005 if kind == "elit-sit" else 0  # its queries are the same for both branches, and computed once
        assert counter.get_total_flops() - times.get_total_flops() == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("change", [{}, {"steps": 5}, {"sample_budgets": (8, 4)}, {"solver": "heun", "cache": 0}])
def test_what_is_given_by_name_takes_the_place_of_a_plan(change):
    model, plan = opened("elit-dit"), Plan(steps=6, budget=0.5, guidance=CCFG(2.0, 1), cache=0.5)
    changed = replace(plan, **({"budget": None} if "sample_budgets" in change else {}) | change)
    assert torch.equal(sample(model, [0, 1], plan=plan, **change), sample(model, [0, 1], changed))
    by_hand = sample(model, [0, 1], steps=6, budget=0.5, guidance=CCFG(2.0, 1), cache=0.5)
    assert torch.equal(by_hand, sample(model, [0, 1], plan))
