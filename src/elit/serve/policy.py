"""The policy of a replica: the requests that start, their budgets, and refusals. Pure: no Ray, no network, no clock.

It decides between two steps, by a timeline of when each of the waiting, in the order of their deadlines, would be done
with `slots` images in progress. docs/serving.md describes admission, level and order.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from elit.planner.cost import Costs
from elit.sampling.settings import Sampling
from elit.serve.requests import Request

HALF_LIFE = 10.0  # Seconds without a step in which an observed slowdown halves.


@dataclass
class Running:
    """A request in progress."""

    request: Request
    setting: Sampling
    steps_left: int


class Refusal(NamedTuple):
    request: Request
    reason: str  # "deadline", "queue", or "impossible": late even alone
    retry_after: float  # seconds after which the same request, as urgent as it was, would be taken; or that it needs


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """The limits of a policy."""

    slots: int = 8  # images in progress at a time
    max_queue: int = 64  # waiting images
    safety: float = 1.1  # predicted times are taken this many times longer
    reserve: float = 0.5  # share of the time to its deadline that a level leaves a request, for those who come next
    hold: float = 0.5  # seconds for which a higher level must have been possible before it is taken


@dataclass
class Policy:
    """The state of one replica: what waits, what runs, and the level."""

    costs: Costs
    levels: int  # rungs of the service's ladder
    settings: PolicySettings = field(default_factory=PolicySettings)
    waiting: list[Request] = field(default_factory=list)  # sorted by deadline, then arrival
    running: list[Running] = field(default_factory=list)
    slowdown: float = 1.0  # the time of recent steps over their predicted time
    level: int = -1
    _possible: int = -1
    _limited: float = -math.inf
    _last: float = 0.0  # when a request or a decision came last

    def __post_init__(self) -> None:
        self.level = self._possible = self.levels - 1

    def arrive(self, request: Request, now: float) -> Refusal | None:
        """Queues a request, unless it is refused."""
        if not self.running and self.slowdown > 1:  # no step corrects it, and it may refuse everything
            self.slowdown = 1 + (self.slowdown - 1) * 0.5 ** ((now - self._last) / HALF_LIFE)
        self._last = now
        if (alone := self._alone(request)) > request.deadline - request.arrival:
            return Refusal(request, "impossible", alone)
        if self.waiting and sum(each.images for each in (*self.waiting, request)) > self.settings.max_queue:
            drained = self.costs.alone_ms(request.least, request.images) * self.slowdown / 1e3
            return Refusal(request, "queue", drained)
        if late := self._late(now, sorted([*self.waiting, request], key=by_deadline)):
            before = {} if request.id in late else self._late(now, self.waiting)
            if caused := [by for id, by in late.items() if id not in before]:
                return Refusal(request, "deadline", max(caused))
        insort(self.waiting, request, key=by_deadline)
        return None

    def leave(self, id: str) -> None:
        """Frees the place of a request whose client has gone or which has failed."""
        self.waiting = [request for request in self.waiting if request.id != id]
        self.running = [each for each in self.running if each.request.id != id]

    def decide(self, now: float) -> tuple[list[Running], list[Refusal]]:
        """The requests that start between two steps, and those that can no longer be met, since steps took longer."""
        self._last = now
        if not self.waiting or not self._free(self.running, self.waiting[0]):
            return [], []
        already = len(self.running)
        lost: dict[str, Refusal] = {}  # late at their least: it is better not to begin them
        list(self.finishes(now, [(each, each.least) for each in self.waiting], lost))
        self.waiting = [each for each in self.waiting if each.id not in lost]
        level = self._steady(self._highest(now), now) if self.waiting else self.level
        while self.waiting and self._free(self.running, self.waiting[0]):
            setting = self._setting(now, self.waiting[0], level)
            if self.running and self._harms(now, self.waiting[0], setting):
                break
            self.running.append(Running(self.waiting.pop(0), setting, setting.steps))
        return self.running[already:], list(lost.values())

    def stepped(self, ms: float) -> list[Running]:
        """Counts a step of `ms`; returns the requests that are done."""
        if (predicted := self.costs.step_ms((each.setting, each.request.images) for each in self.running)) > 0:
            # A single step may be disturbed by anything: it counts a tenth, and at most 4 times the old value.
            self.slowdown = 0.9 * self.slowdown + 0.1 * min(ms / predicted, 4 * self.slowdown)
        for each in self.running:
            each.steps_left -= 1
        done = [each for each in self.running if each.steps_left <= 0]
        self.running = [each for each in self.running if each.steps_left > 0]
        return done

    def finishes(
        self, now: float, waiting: Sequence[tuple[Request, Sampling]], lost: dict[str, Refusal] | None = None
    ) -> Iterable[tuple[Request, float]]:
        """When running requests, and waiting ones in this order and at these settings, would be done; as they end."""
        scale = self.settings.safety * self.slowdown / 1e3
        running = [replace(each) for each in self.running]
        place, at = 0, now
        before: dict[str, tuple[float, list[Running], int, int]] = {}
        while running or place < len(waiting):
            while place < len(waiting) and self._free(running, waiting[place][0]):
                request, setting = waiting[place]
                place += 1
                if lost is not None:
                    before[request.id] = at, [replace(each) for each in running], place, len(lost)
                running.append(Running(request, setting, setting.steps))
            steps = min(each.steps_left for each in running)
            at += steps * scale * self.costs.step_ms((each.setting, each.request.images) for each in running)
            late: Refusal | None = None
            for each in running:
                each.steps_left -= steps
                if each.steps_left == 0:
                    at += scale * each.request.images * self.costs.image
                    yield each.request, at
                    if at > each.request.deadline and each.request.id in before:
                        late = late or Refusal(each.request, "deadline", at - each.request.deadline)
            running = [each for each in running if each.steps_left > 0]
            if late is not None and lost is not None:
                at, running, place, count = before[late.request.id]
                while len(lost) > count:  # those later in order have another chance
                    lost.popitem()
                lost[late.request.id] = late

    def _late(self, now: float, waiting: Sequence[Request]) -> dict[str, float]:
        """The requests that miss a deadline with all at the least, and by how many seconds."""
        ends = self.finishes(now, [(each, each.least) for each in waiting])
        return {request.id: at - request.deadline for request, at in ends if at > request.deadline}

    def _harms(self, now: float, request: Request, setting: Sampling) -> bool:
        """True where requests in progress meet their deadlines now, but not if this one starts beside them."""
        ids = {each.request.id for each in self.running}

        def met(waiting: Sequence[tuple[Request, Sampling]]) -> bool:
            return all(at <= each.deadline for each, at in self.finishes(now, waiting) if each.id in ids)

        return not met([(request, setting)]) and met([])

    def _highest(self, now: float) -> int:
        """The highest level at which all that wait end with their reserve left, or in time; else the lowest."""
        limits, urgent = self.settings, {each.id for each in self.waiting if self._urgent(each)}
        shares = {each.id: 1 - limits.reserve * (each.id not in urgent) for each in self.waiting}
        due = {each.id: each.arrival + shares[each.id] * (each.deadline - each.arrival) for each in self.waiting}

        def missed(level: int) -> bool:
            settings = [(each, each.least if each.id in urgent else each.at(level)) for each in self.waiting]
            return any(at > due.get(each.id, math.inf) for each, at in self.finishes(now, settings))

        filled = (sum(each.images for each in self.waiting) - limits.slots) / limits.max_queue
        most = round((self.levels - 1) * min(1.0, max(0.0, 1.5 - 2 * filled)))
        return min(most, bisect_left(range(1, self.levels), True, key=missed))

    def _urgent(self, request: Request) -> bool:
        """True where no level leaves it its reserve, not even alone."""
        return self._alone(request) > (1 - self.settings.reserve) * (request.deadline - request.arrival)

    def _alone(self, request: Request) -> float:
        """Seconds of a request at its least, on a machine that is not slower than the costs say."""
        alone = self.costs.alone_ms(request.least, request.images)
        return alone * self.settings.safety * min(1.0, self.slowdown) / 1e3

    def _setting(self, now: float, request: Request, level: int) -> Sampling:
        """That of the level; of an urgent request, the highest up to it with which it meets its deadline."""

        def late(level: int) -> bool:
            ends = self.finishes(now, [(request, request.at(level))])
            return any(at > each.deadline for each, at in ends if each.id == request.id)

        if self._urgent(request):
            level = bisect_left(range(1, level + 1), True, key=late)
        return request.at(level)

    def _steady(self, target: int, now: float) -> int:
        """Down at once; up to the level that has been possible for all of the last `hold` seconds."""
        if target <= self.level:
            self.level, self._possible, self._limited = target, self.levels - 1, now
            return target
        self._possible = min(self._possible, target)
        if now - self._limited >= self.settings.hold:
            self.level, self._possible, self._limited = self._possible, self.levels - 1, now
        return self.level

    def _free(self, running: Sequence[Running], request: Request) -> bool:
        busy = sum(each.request.images for each in running)
        return not running or busy + request.images <= self.settings.slots


def by_deadline(request: Request) -> tuple[float, float, str]:
    return request.deadline, request.arrival, request.id
