"""Runs of an engine: several at once are each what `elit.sample` makes alone."""

import pytest
import torch
from conftest import opened

from elit import AG, CCFG, CFG, Sampling
from elit.sampling.engine import NetworkEngine, conditions_of, take
from elit.sampling.sample import sample

SETTINGS = [
    Sampling(steps=3, budget=4),
    Sampling(steps=3, budget=8, guidance=CFG(2.0)),
    Sampling(steps=4, budget="25%@0-0.5,100%@0.5-1", guidance=CCFG(2.0, 1), solver="heun"),
    Sampling(steps=2, guidance=AG(2.0, 2), shift=2.0),
    Sampling(steps=6, cache=100.0),
    Sampling(steps=2, budget=8, dtype="bfloat16"),
]


def finished(engine, model):
    """A run of every setting; all are stepped together while they last."""
    runs = [engine.begin([str(i % 5)], [i], sampling) for i, sampling in enumerate(SETTINGS)]
    while going := [run for run in runs if not run.done]:
        engine.step(going)
    return [(run, sample(model, [i % 5], SETTINGS[i], seed=i)) for i, run in enumerate(runs)]


@pytest.mark.parametrize("exact", [True, False])
def test_runs_together_are_those_alone(exact):
    model = opened("elit-dit")
    for run, alone in finished(NetworkEngine(model, exact=exact), model):
        assert (run.steps_done, run.done) == (run.total, True)
        torch.testing.assert_close(run.x, alone, rtol=0, atol=0 if exact else 1e-4)


def test_a_run_shows_its_state_and_can_be_closed():
    model = opened("elit-dit", in_channels=3)
    engine = NetworkEngine(model)
    states = []
    expected = sample(model, [1], steps=3, on_step=lambda step, t, x: states.append((step, t, x)))
    run = engine.begin(["1"], [0], Sampling(steps=3))
    for step, t, x in states:
        assert (run.steps_done, run.t) == (step, t)
        assert torch.equal(run.x, x)
        run.step()
    assert torch.equal(run.preview(), run.pictures())
    assert torch.equal(run.pictures(), expected)
    other = engine.begin(["1"], [0], Sampling(steps=3))
    other.step()
    assert not torch.equal(other.preview(), expected)
    other.close()
    assert other.done


def test_an_engine_says_what_it_takes():
    engine = NetworkEngine(opened("elit-dit", in_channels=3))
    assert (engine.size, engine.classes, engine.makes_pictures) == ((16, 16), tuple("01234"), True)
    assert conditions_of(engine, ["3", "1"], []).tolist() == [3, 1]
    assert take(conditions_of(engine, [], []), range(3, 7)).tolist() == [3, 4, 0, 1]
    with pytest.raises(ValueError, match="prompts are not supported for this model"):
        conditions_of(engine, [], ["a seven"])
    with pytest.raises(ValueError, match="labels must be a class, 0 to 4"):
        engine.conditions(["9"])
    full, half = (engine.gflops(Sampling(steps=2, budget=budget)) for budget in (None, 8))
    assert half < full < engine.gflops(Sampling(steps=2, guidance=CFG(2.0)))
    assert engine.begin(["1"], [0], Sampling(), size=(24, 16)).x.shape == (1, 3, 16, 24)
