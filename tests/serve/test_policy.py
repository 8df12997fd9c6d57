"""Invariants of the policy: never below the floor, nobody admitted is predicted late, order, work, bounds."""

import time
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st
from simulator import simulate

from elit.planner.cost import Costs
from elit.serve.loadtest import arrivals, summarize
from elit.serve.policy import Policy, PolicySettings, by_deadline
from elit.serve.requests import Request
from elit.serve.settings import ServiceSettings

RUNGS = ServiceSettings(model="digits", steps=8, least_steps=8).ladder(range(1, 17))  # eight rungs
COSTS = Costs(call=2.0, core=0.5, around=6.0, linear=0.5, image=3.0)
FULL_MS, FLOOR_MS = COSTS.alone_ms(RUNGS[-1]), COSTS.alone_ms(RUNGS[0])


def request(id, arrival, deadline, low=0, high=7, images=1):
    settings, seeds = RUNGS[low : high + 1], (0,) * images
    return Request(id=str(id), arrival=arrival, deadline=deadline, settings=settings, first=low, seeds=seeds)


@st.composite
def traffic(draw):
    now, requests = 0.0, []
    for number in range(draw(st.integers(1, 25))):
        now += draw(st.floats(0, 0.2))
        low = draw(st.integers(0, len(RUNGS) - 1))
        high = draw(st.integers(low, len(RUNGS) - 1))
        patience = draw(st.floats(0, 3))
        requests.append(request(number, now, now + patience, low, high, draw(st.integers(1, 3))))
    return requests


@st.composite
def policies(draw):
    limits = {"slots": draw(st.integers(1, 4)), "max_queue": draw(st.integers(3, 30))}
    limits |= {"hold": draw(st.sampled_from([0.0, 0.5])), "reserve": draw(st.sampled_from([0.0, 0.25]))}
    return Policy(replace(COSTS, separate=draw(st.booleans())), len(RUNGS), PolicySettings(**limits))


def run(policy, requests, slower=1.0):
    now, todo = 0.0, list(requests)
    starts, refused, ends = [], {}, {}
    while todo or policy.waiting or policy.running:
        while todo and (todo[0].arrival <= now or not (policy.waiting or policy.running)):
            arriving = todo.pop(0)
            now = max(now, arriving.arrival)
            if refusal := policy.arrive(arriving, now):
                refused[arriving.id] = refusal
            check(policy, now)
        queue = list(policy.waiting)
        started, refusals = policy.decide(now)
        refused |= {refusal.request.id: refusal for refusal in refusals}
        left = [each for each in queue if each.id not in refused]
        assert [each.request for each in started] == left[: len(started)], "not by deadline"
        starts += [(each.request, each.setting) for each in started]
        if left:
            assert policy.running, "idle though somebody waits"
        if policy.running:
            ms = policy.costs.step_ms((each.setting, each.request.images) for each in policy.running)
            now += slower * ms / 1e3
            for done in policy.stepped(slower * ms):
                now += done.request.images * policy.costs.image / 1e3
                ends[done.request.id] = now
        check(policy, now)
    return starts, refused, ends


def check(policy, now):
    assert policy.waiting == sorted(policy.waiting, key=by_deadline)
    one = max((each.images for each in policy.waiting), default=0)
    assert sum(each.images for each in policy.waiting) <= max(policy.settings.max_queue, one)
    busy = [each.request.images for each in policy.running]
    assert sum(busy) <= policy.settings.slots or len(busy) == 1


@settings(max_examples=50, deadline=None, derandomize=True)
@given(policies(), traffic(), st.sampled_from([1.0, 3.0]))
def test_every_request_ends_once_and_never_below_what_it_accepts(policy, requests, slower):
    starts, refused, ends = run(policy, requests, slower)
    assert set(refused) | set(ends) == {each.id for each in requests}
    assert not set(refused) & set(ends)
    for started, setting in starts:
        assert setting in started.settings
    assert len(starts) == len({started.id for started, _ in starts}) == len(ends)
    for refusal in refused.values():
        assert refusal.retry_after > 0


@settings(max_examples=50, deadline=None, derandomize=True)
@given(policies(), traffic())
def test_nobody_admitted_is_predicted_late(policy, requests):
    for number, arriving in enumerate(requests):
        due = arriving.deadline - arriving.arrival
        if policy.arrive(replace(arriving, arrival=number * 1e-9, deadline=due), 0.0) is None:
            assert policy.waiting
            for waiting, at in timeline(policy, 0.0):
                assert at <= waiting.deadline + 1e-9


def timeline(policy, now):
    queue, active, at = list(policy.waiting), [], now
    while queue or active:
        while queue and (not active or sum(r.images for r, _ in active) + queue[0].images <= policy.settings.slots):
            active.append((queue[0], queue.pop(0).least.steps))
        at += policy.settings.safety * policy.costs.step_ms((r.least, r.images) for r, _ in active) / 1e3
        active = [(r, left - 1) for r, left in active]
        for ended in [r for r, left in active if left == 0]:
            at += policy.settings.safety * ended.images * policy.costs.image / 1e3
            yield ended, at
        active = [(r, left) for r, left in active if left]


def test_the_level_is_the_highest_that_all_deadlines_allow():
    policy = Policy(COSTS, len(RUNGS), PolicySettings(slots=1, safety=1.0, reserve=0.0, hold=0.0))
    for number in range(5):
        assert policy.arrive(request(number, 0.0, 3 * FULL_MS / 1e3), 0.0) is None
    place = RUNGS.index(policy.decide(0.0)[0][0].setting)
    assert 5 * COSTS.alone_ms(RUNGS[place]) <= 3 * FULL_MS < 5 * COSTS.alone_ms(RUNGS[place + 1])


def test_what_cannot_be_met_is_refused_at_once_and_told_when_to_come_back():
    policy, due = Policy(COSTS, len(RUNGS), PolicySettings(slots=1, safety=1.0)), 4.01 * FLOOR_MS / 1e3
    *there, refusal = [policy.arrive(request(number, 0.0, due), 0.0) for number in range(5)]
    assert (there, refusal.reason) == ([None] * 4, "deadline")
    assert refusal.retry_after == pytest.approx(0.99 * FLOOR_MS / 1e3)
    policy = Policy(COSTS, len(RUNGS), PolicySettings(slots=1, max_queue=3))
    answers = [policy.arrive(request(number, 0.0, 1e6), 0.0) for number in range(5)]
    assert [answer and answer.reason for answer in answers] == [None, None, None, "queue", "queue"]


def test_the_level_falls_at_once_and_rises_slowly():
    policy = Policy(COSTS, len(RUNGS), PolicySettings(hold=1.0))
    top = len(RUNGS) - 1
    seen = [policy._steady(target, now) for now, target in ((0.0, 2), (0.5, 5), (0.9, top), (1.1, 6), (1.5, top))]
    assert seen == [2, 2, 2, 5, 5]
    assert policy._steady(top, 2.2) == top
    # A load that asks for 3 and 5 in turn leaves it at 3.
    assert {policy._steady(3 + 2 * (step % 2), 3 + 0.1 * step) for step in range(40)} == {3}


def test_steps_that_take_longer_lower_the_level():
    policy = Policy(COSTS, len(RUNGS), PolicySettings(slots=1, hold=0.0))
    assert policy.arrive(request("a", 0.0, 2 * FULL_MS / 1e3), 0.0) is None
    before = policy.decide(0.0)[0][0].setting
    for _ in range(before.steps):
        policy.stepped(4 * COSTS.step_ms([(before, 1)]))
    assert 2 < policy.slowdown < 4
    policy.arrive(request("b", 1.0, 1 + 4 * FULL_MS / 1e3), 1.0)
    assert policy.decide(1.0)[0][0].setting.budget < before.budget


@pytest.mark.parametrize(("deadline_ms", "slots"), [(20_000, 1), (60_000, 1), (20_000, 4)])
def test_the_level_falls_as_the_queue_fills(deadline_ms, slots):
    trace = arrivals([1.6 * COSTS.rate(RUNGS[-1], slots)] * 30, 1)
    limits = PolicySettings(slots=slots, max_queue=64)
    summary = summarize(simulate(trace, RUNGS, COSTS, limits, deadline_ms=deadline_ms))
    assert summary["violations"] == 0
    assert 2 < summary["mean_budget"] < 16


@pytest.mark.parametrize(("low", "patience"), [(0, 1.3 * FLOOR_MS), (0, 1.9 * FLOOR_MS), (7, 1.3 * FULL_MS)])
def test_a_request_that_no_level_helps_lowers_nobody(low, patience):
    policy = Policy(COSTS, len(RUNGS), PolicySettings(slots=1))
    started = []
    for number, special in enumerate((True, False, True, False)):
        due = patience / 1e3 if special else 60.0
        now = number * FULL_MS / 1e3
        assert policy.arrive(request(number, now, now + due, low if special else 0), now) is None
        (running,) = policy.decide(now)[0]
        started.append(running.setting)
        policy.leave(running.request.id)
    assert started[1] == started[3] == RUNGS[-1]
    for setting in started[::2]:  # and itself has what its deadline allows
        assert 1.1 * COSTS.alone_ms(setting) <= patience
        assert setting == RUNGS[-1] or 1.1 * COSTS.alone_ms(RUNGS[RUNGS.index(setting) + 1]) > patience


def test_an_urgent_request_in_progress_lowers_nobody():
    policy = Policy(replace(COSTS, separate=True), len(RUNGS), PolicySettings(slots=4))
    assert policy.arrive(request("urgent", 0.0, 1.5 * FLOOR_MS / 1e3), 0.0) is None
    policy.decide(0.0)
    now = 0.2 * FLOOR_MS / 1e3
    policy.arrive(request("other", now, now + 60), now)
    assert policy.decide(now)[0][0].setting == RUNGS[-1]


@pytest.mark.parametrize("images", [1, 3])
def test_a_deadline_that_nothing_meets_is_not_one_to_try_again(images):
    policy = Policy(COSTS, len(RUNGS), PolicySettings(slots=4))
    least = 1.1 * COSTS.alone_ms(RUNGS[0], images) / 1e3
    for place, share in enumerate((0.1, 0.99, 1.01)):
        refusal = policy.arrive(request(place, 5.0, 5.0 + share * least, images=images), 5.0)
        assert (refusal and refusal.reason) == ("impossible" if share < 1 else None)
    policy.slowdown = 9.0  # a machine that is slow now is no such reason
    assert policy.arrive(request("b", 5.0, 5.0 + 2 * least), 5.0).reason == "deadline"


@pytest.mark.parametrize("slots", [1, 4])
def test_a_thousand_waiting_are_judged_at_once(slots):
    policy = Policy(COSTS, len(RUNGS), PolicySettings(slots=slots, max_queue=1000))
    each = FLOOR_MS / 1e3 / slots
    policy.waiting = [request(f"{place:04}", 0.0, 2 * each * (place + 8)) for place in range(1000)]
    policy.slowdown, start = 4.0, time.perf_counter()
    _, refused = policy.decide(0.0)
    assert time.perf_counter() - start < 1.0
    assert 300 < len(refused) < 900
    assert not policy._late(0.0, policy.waiting)
    for refusal in refused[:: len(refused) // 3]:  # none of them could have stayed
        queue = sorted([*policy.waiting, refusal.request], key=by_deadline)
        assert policy._late(0.0, queue)


def test_a_slowdown_decays_while_nothing_runs():
    """Or a service that refuses everything after a slow step would do so for ever."""
    policy, patience = Policy(COSTS, len(RUNGS), PolicySettings(slots=1)), 1.5 * FULL_MS / 1e3
    policy.arrive(request("a", 0.0, 10.0), 0.0)
    policy.decide(0.0)
    policy.slowdown = 40.0
    policy.leave("a")
    assert policy.arrive(request("b", 1.0, 1.0 + patience), 1.0).reason == "deadline"
    assert policy.arrive(request("c", 90.0, 90.0 + patience), 90.0) is None
