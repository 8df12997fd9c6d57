"""A service by discrete events: the same policy, a profile's costs, any number of replicas, no clock and no model.

elit profile MODEL
python benchmarks/simulator.py MODEL/profile-….json --rate 4 --replicas 8

The rate of requests has the shape of the Azure Functions trace in DiffServe's evaluation: a slow wave like that of a
day, noise with memory, and bursts that rise within a second or two and fade.
"""

import argparse
import heapq
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from elit.evaluate.tables import print_table
from elit.planner.cost import Costs, branch_latents
from elit.planner.profile import read_profile
from elit.sampling.settings import Sampling
from elit.serve.loadtest import Outcome, arrivals, summarize
from elit.serve.policy import Policy, PolicySettings
from elit.serve.requests import Request
from elit.serve.settings import ServiceSettings

FOR_EVER = 1e9
"""Seconds."""


def bursty_rates(seconds: int, mean: float, seed: int = 0) -> list[float]:
    """Requests a second, one number a second, with `mean` over all; the highest is about twice that."""
    draw = random.Random(f"rates/{seed}")
    phase, noise = draw.uniform(0, 2 * math.pi), 0.0
    shape = []
    for second in range(seconds):
        noise = 0.8 * noise + draw.gauss(0, 0.08)
        wave = 0.35 * math.sin(phase + 2 * math.pi * second / max(seconds, 1))
        shape.append(max(0.1, 1 + wave + noise))
    for _ in range(max(1, seconds // 40)):
        start, height, fade = draw.randrange(seconds), draw.uniform(0.6, 1.2), draw.uniform(3, 8)
        for second in range(start, seconds):
            rise = min(1.0, (second - start + 1) / 2)
            shape[second] += height * rise * math.exp(-(second - start) / fade)
    scale = mean * seconds / sum(shape)
    return [scale * each for each in shape]


@dataclass
class Replica:
    policy: Policy
    stepping: bool = False


def simulate(
    times: Sequence[float],
    ladder: Sequence[Sampling],
    costs: Costs,
    settings: PolicySettings,
    *,
    deadline_ms: float,
    patient: bool = False,
    replicas: int = 1,
    seed: int = 0,
    noise: float = 0.0,
    wait_ms: float = 0.0,
    believed: Costs | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """The outcomes of requests that arrive at `times`, in seconds, in the same order.

    Two replicas are drawn for a request, and the one with fewer requests takes it, as Ray Serve routes. noise: standard
    deviation of the logarithm of a step's time. wait_ms: of a request on its way to a replica and back, in no replica's
    time. patient: requests that would be late are served late, not refused. believed: the policy's costs where they
    differ from the true.
    """
    draw, order = random.Random(seed), count()
    fleet = [Replica(Policy(believed or costs, len(ladder), settings)) for _ in range(replicas)]
    outcomes: list[Outcome | None] = [None] * len(times)
    events: list[tuple[float, int, str, int]] = []
    for place, at in enumerate(times):
        heapq.heappush(events, (at, next(order), "arrival", place))

    def refuse(request: Request) -> None:
        due = request.arrival + deadline_ms / 1e3
        outcomes[int(request.id)] = Outcome(arrival=request.arrival, deadline=due, status=429)

    def advance(which: int, now: float) -> None:
        """The replica decides, and runs its next step if it has any."""
        policy = fleet[which].policy
        _, refusals = policy.decide(now)
        for refusal in refusals:
            refuse(refusal.request)
        if not policy.running:
            return
        ms = costs.step_ms((each.setting, each.request.images) for each in policy.running)
        taken[which] = ms * draw.lognormvariate(0, noise) if noise else ms
        fleet[which].stepping = True
        heapq.heappush(events, (now + taken[which] / 1e3, next(order), "step", which))

    taken = [0.0] * replicas
    patience = FOR_EVER if patient else deadline_ms / 1e3
    finished = 0
    while events:
        now, _, kind, which = heapq.heappop(events)
        if kind == "arrival":
            request = Request(id=str(which), arrival=now, deadline=now + patience, settings=tuple(ladder))
            place = route(fleet, draw)
            if fleet[place].policy.arrive(request, now):
                refuse(request)
            elif not fleet[place].stepping:
                advance(place, now)
        elif kind == "step":
            for each in fleet[which].policy.stepped(taken[which]):
                request, setting = each.request, each.setting
                now += request.images * costs.image / 1e3
                outcomes[int(request.id)] = Outcome(
                    arrival=request.arrival,
                    deadline=request.arrival + deadline_ms / 1e3,
                    finish=now + wait_ms / 1e3,
                    budget=branch_latents(setting)[0] or None,
                    steps=setting.steps,
                )
                finished += 1
                if progress:
                    progress(finished, len(times))
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


def main(line: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", type=Path, help="costs: a file of elit profile")
    parser.add_argument("--rate", type=float, default=2.0, help="mean requests a second")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="at full quality; default: 20")
    parser.add_argument("--least-steps", type=int)
    parser.add_argument("--least-budget", default="")
    parser.add_argument("--deadline-ms", type=float, default=5000.0)
    parser.add_argument("--max-batch", type=int, default=0)
    parser.add_argument("--max-queue", type=int, default=64)
    parser.add_argument("--replicas", type=int, default=1)
    args = parser.parse_args(line)
    profile = read_profile(args.profile)
    costs = replace(profile.costs(), separate=not profile.cost["overlapping"])
    named = {name: getattr(args, name) for name in ("steps", "least_steps", "least_budget")}
    service = ServiceSettings(model=Path(), **{name: value for name, value in named.items() if value})
    ladder = service.ladder(profile.anatomy["budgets"])
    slots = args.max_batch or costs.efficient_batch(ladder[0], 8)
    policy = PolicySettings(slots=slots, max_queue=args.max_queue)
    times = arrivals(bursty_rates(args.seconds, args.rate, args.seed), args.seed)
    outcomes = simulate(times, ladder, costs, policy, deadline_ms=args.deadline_ms, replicas=args.replicas)
    full = costs.rate(ladder[-1], slots) * args.replicas
    title = f"{args.replicas} replicas, {slots} images in progress each; {full:.1f} images/s at full quality"
    rows = [(name, "" if value is None else f"{value:.4g}") for name, value in summarize(outcomes).items()]
    print_table(("", "simulated"), rows, title=title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
