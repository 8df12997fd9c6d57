"""A service by discrete events: the same policy, a profile's costs, any number of replicas, no clock and no model.

elit profile MODEL
elit loadtest http://127.0.0.1:8000 --rate 4 --arrivals bursty --write-trace trace.jsonl
python benchmarks/simulator.py trace.jsonl --profile MODEL/profile-….json --replicas 8
"""

import argparse
import heapq
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from elit.evaluate.report.tables import print_table
from elit.planner.cost import Costs, branch_latents
from elit.planner.profile import read_profile
from elit.sampling.settings import Sampling
from elit.serve.ladder import qualities
from elit.serve.loadtest import Arrival, Outcome, read_trace, summarize
from elit.serve.policy import Policy, PolicySettings
from elit.serve.requests import Request
from elit.serve.settings import ServiceSettings


@dataclass
class Replica:
    policy: Policy
    stepping: bool = False


def simulate(
    trace: Sequence[Arrival],
    ladder: Sequence[Sampling],
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
    """The outcome of every request of `trace`, in its order.

    Two replicas are drawn for a request, and the one with fewer requests takes it, as Ray Serve routes. deadline_ms:
    of requests without one. noise: standard deviation of the logarithm of a step's time. wait_ms: of a request on
    its way to a replica and back, in no replica's time. believed: the policy's costs where they differ from the true.
    """
    accepted, draw, order = qualities(ladder), random.Random(seed), count()
    fleet = [Replica(Policy(believed or costs, len(ladder), settings)) for _ in range(replicas)]
    outcomes: list[Outcome | None] = [None] * len(trace)
    started: dict[str, tuple[float, Sampling]] = {}
    events: list[tuple[float, int, str, int]] = []
    for place, arrival in enumerate(trace):
        heapq.heappush(events, (arrival.at, next(order), "arrival", place))

    def refuse(request: Request) -> None:
        outcomes[int(request.id)] = Outcome(arrival=request.arrival, deadline=request.deadline, status=429)

    def advance(which: int, now: float) -> None:
        """The replica decides, and runs its next step if it has any."""
        policy = fleet[which].policy
        starts, refusals = policy.decide(now)
        for refusal in refusals:
            refuse(refusal.request)
        for start in starts:
            started[start.request.id] = (now, start.setting)
        if not policy.running:
            return
        ms = costs.step_ms((each.setting, each.request.images) for each in policy.running)
        times[which] = ms * draw.lognormvariate(0, noise) if noise else ms
        fleet[which].stepping = True
        heapq.heappush(events, (now + times[which] / 1e3, next(order), "step", which))

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
                refuse(request)
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
                    budget=branch_latents(setting)[0] or None,
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


def main(line: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="one JSON object a line, as elit loadtest --write-trace writes it")
    parser.add_argument("--profile", type=Path, required=True, help="costs: a file of elit profile")
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
    trace = read_trace(args.trace)
    outcomes = simulate(trace, ladder, costs, policy, deadline_ms=args.deadline_ms, replicas=args.replicas)
    full = costs.rate(ladder[-1], slots) * args.replicas
    title = f"{args.replicas} replicas, {slots} images in progress each; {full:.1f} images/s at full quality"
    rows = [(name, "" if value is None else f"{value:.4g}") for name, value in summarize(outcomes).items()]
    print_table(("", "simulated"), rows, title=title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
