"""Guidance as an operator on callables, without any network."""

import pytest
import torch

from elit.flow.guidance import AG, CCFG, CFG, Branch, branches, guided_velocity, make_guidance

BUDGETS = tuple(range(1, 17))


def field(branch: Branch) -> torch.Tensor:
    """A velocity that tells class and budget apart."""
    return torch.tensor([10.0 * (not branch.drop_class) + branch.budget])


def guided(guidance, t=0.5, budget=16):
    plan = branches(guidance, t, budget, BUDGETS)
    return guided_velocity([field(branch) for branch in plan], guidance.scale if guidance else 1.0)


@pytest.mark.parametrize(
    ("guidance", "weak"),
    [(CFG(3.0), Branch(True, 16)), (AG(3.0, 4), Branch(False, 4)), (CCFG(3.0, 4), Branch(True, 4))],
)
def test_the_operator(guidance, weak):
    """(λ+1)·main − λ·weak with scale = λ + 1."""
    main = field(Branch(False, 16))
    assert branches(guidance, 0.5, 16, BUDGETS) == [Branch(False, 16), weak]
    assert torch.allclose(guided(guidance), 3 * main - 2 * field(weak))


def test_interval_and_scale_one():
    for off in (CFG(1.0), AG(1.0, 2), CCFG(1.0, 2)):
        assert branches(off, 0.5, 16, BUDGETS) == branches(None, 0.5, 16, BUDGETS)
    guidance = CFG(2.0, interval=(0.2, 0.7))
    assert [len(branches(guidance, t, 16, BUDGETS)) for t in (0.1, 0.2, 0.5, 0.7, 0.8)] == [1, 2, 2, 2, 1]
    assert len(branches(CFG(2.0, interval=(1 - 0.7, 1.0)), 0.3, 16, BUDGETS)) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CFG(-1.0), "guidance scale must be at least 0, got -1.0"),
        (lambda: CFG(2.0, interval=(0.0, 1.2)), "guidance interval"),
        (lambda: guided(AG(2.0, 8), budget=4), "guidance_budget must be at most the main branch's 4 for ag, got 8"),
        (lambda: guided(CCFG(2.0, 17)), "budget must be .*, got 17"),
        (lambda: branches(CCFG(2.0, 1), 0.5, None, ()), "guidance must be cfg for a model without a latent interface"),
    ],
)
def test_bad_guidance_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_guidance_by_name_is_that_of_the_function():
    assert make_guidance("none", 2.0) is None
    assert make_guidance("cfg", 2.0, 1, (0.2, 0.8)) == CFG(2.0, interval=(0.2, 0.8))
    assert make_guidance("ag", 2.0, "4") == AG(2.0, 4)
    assert make_guidance("ccfg", 2.0, "25%") == CCFG(2.0, 0.25)
    with pytest.raises(ValueError, match="guidance must be one of none, cfg, ag, ccfg, got 'pag'"):
        make_guidance("pag", 2.0)
