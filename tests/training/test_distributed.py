"""Blocks compiled one by one, in every backbone."""

from functools import partial

import pytest
import torch
from conftest import fresh, inputs

from elit.training.distributed import compile_blocks

pytestmark = pytest.mark.slow

# Kinds of block, each twice where its length changes with the budget; U-ViT's with a skip are another kind.
GRAPHS = {"dit": 1, "elit-dit": 2, "uvit": 2, "elit-uvit": 4, "elit-hdit": 4, "elit-mmdit": 4}
GRAPHS |= {"elit-dit-video": 2, "elit-sit": 2}


@pytest.mark.parametrize("kind", GRAPHS)
def test_compiled_blocks_of_every_backbone(kind, monkeypatch):
    """Same velocity and gradients, no graph break (fullgraph raises), and no graph more for more budgets."""
    backend = "aot_eager" if kind in ("elit-dit", "elit-mmdit") else "eager"  # the same graphs, and theirs traced again
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = fresh(kind), fresh(kind)
    compile_blocks(compiled.blocks)
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    x, t, y = inputs(plain)
    budgets = plain.budgets[::-1] if len(plain.budgets) < 8 else plain.budgets[::-3]  # down to the least
    for budget in budgets or (None,):
        expected, found = plain(x, t, y, budget), compiled(x, t, y, budget)
        assert torch.allclose(found, expected, atol=1e-5)
        for each in (plain, compiled):
            each.zero_grad()
        expected.square().sum().backward()
        found.square().sum().backward()
        for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            assert a.grad is None or torch.allclose(a.grad, b.grad, atol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= GRAPHS[kind]
    compiled.enable_gradient_checkpointing()
    compiled(x, t, y).sum().backward()
