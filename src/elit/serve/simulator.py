"""A service by discrete events: the same policy, the profile's costs, any number of replicas, no clock and no model."""

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from elit.serve.costs import Costs, Setting
from elit.serve.outcomes import Outcome
from elit.serve.policy import Policy, PolicySettings, Request
from elit.serve.trace import Arrival

Quality = dict[str, tuple[tuple[Setting, ...], int]]
"""For each quality that a client may ask for, what it accepts, and the rung of the ladder where that begins."""


def qualities(ladder: Sequence[Setting]) -> Quality:
    """What low, medium, high and auto accept of a service's ladder, from its least to its full setting.

    auto: all of it. high: the full setting or nothing. medium: from its middle up. low: up to its middle.
    """
    middle = len(ladder) // 2
    return {
        "auto": (tuple(ladder), 0),
        "low": (tuple(ladder[: middle + 1]), 0),
        "medium": (tuple(ladder[middle:]), middle),
        "high": (tuple(ladder[-1:]), len(ladder) - 1),
    }


@dataclass
class Replica:
    policy: Policy
    stepping: bool = False


def simulate(
    trace: Sequence[Arrival],
    ladder: Sequence[Setting],
    costs: Costs,
    settings: PolicySettings,
    *,
    deadline_ms: float,
    replicas: int = 1,
    seed: int = 0,
    noise: float = 0.0,
    wait_ms: float = 0.0,
    believed: Costs | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """What becomes of every request of `trace`, in its order.

    Two replicas are drawn for a request, and the one with fewer requests takes it, as Ray Serve routes. deadline_ms:
    of requests that have none. noise: standard deviation of the logarithm of a step's time. wait_ms: of a request on
    its way to a replica and back, in no replica's time. believed: the policy's costs where they differ from the true.
    """
    if replicas < 1:
        raise ValueError(f"replicas={replicas}: give at least 1")
    accepted, draw, order = qualities(ladder), random.Random(seed), count()
    fleet = [Replica(Policy(believed or costs, len(ladder), settings)) for _ in range(replicas)]
    outcomes: list[Outcome | None] = [None] * len(trace)
    started: dict[str, tuple[float, Setting]] = {}
    events: list[tuple[float, int, str, int]] = []
    for place, arrival in enumerate(trace):
        heapq.heappush(events, (arrival.at, next(order), "arrival", place))

    def refuse(request: Request, status: int) -> None:
        outcomes[int(request.id)] = Outcome(arrival=request.arrival, deadline=request.deadline, status=status)

    def advance(which: int, now: float) -> None:
        """The replica decides, and runs its next step if it has any."""
        replica = fleet[which]
        policy, loaded = replica.policy, replica.policy.loaded
        decision = policy.decide(now)
        for refusal in decision.refused:
            refuse(refusal.request, 429)
        for request, setting in decision.starts:
            started[request.id] = (now, setting)
        if not policy.running:
            return
        swap = costs.swap if policy.loaded != loaded else 0.0
        ms = costs.step_ms((each.setting, each.request.images) for each in policy.running)
        ms = ms * draw.lognormvariate(0, noise) if noise else ms
        replica.stepping = True
        heapq.heappush(events, (now + (ms + swap) / 1e3, next(order), "step", which))
        times[which] = ms

    times = [0.0] * replicas
    finished = 0
    while events:
        now, _, kind, which = heapq.heappop(events)
        if kind == "arrival":
            arrival = trace[which]
            due = now + (deadline_ms if arrival.deadline_ms is None else arrival.deadline_ms) / 1e3
            settings_of, first = accepted[arrival.quality]
            request = Request(id=str(which), arrival=now, deadline=due, settings=settings_of, first=first)
            place = route(fleet, draw)
            if fleet[place].policy.arrive(request, now):
                refuse(request, 429)
            elif not fleet[place].stepping:
                advance(place, now)
        elif kind == "step":
            for each in fleet[which].policy.stepped(times[which]):
                request, (begun, setting) = each.request, started.pop(each.request.id)
                now += request.images * costs.image / 1e3
                outcomes[int(request.id)] = Outcome(
                    arrival=request.arrival,
                    deadline=request.deadline,
                    finish=now + wait_ms / 1e3,
                    budget=setting.budget,
                    steps=setting.steps,
                    queue_ms=1e3 * (begun - request.arrival),
                    compute_ms=1e3 * (now - begun),
                )
                finished += 1
                if progress:
                    progress(finished, len(trace))
            heapq.heappush(events, (now, next(order), "free", which))  # until then it writes pictures
        else:
            fleet[which].stepping = False
            advance(which, now)
    return [each for each in outcomes if each is not None]


def route(fleet: Sequence[Replica], draw: random.Random) -> int:
    """The one of two replicas that has fewer requests."""
    if len(fleet) == 1:
        return 0
    one, other = draw.sample(range(len(fleet)), 2)
    sizes = [len(fleet[place].policy.waiting) + len(fleet[place].policy.running) for place in (one, other)]
    return one if sizes[0] <= sizes[1] else other
