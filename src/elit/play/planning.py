"""From a target to where the dial stands: `elit.plan` on the page's network, measured first where nobody has."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from elit.planner.choose import plan
from elit.planner.plan import Plan
from elit.planner.profile import measure_profile
from elit.play.dial import GUIDANCES, Dial, pieces_of
from elit.play.engine import Cancelled, NetworkEngine, Tick

SECONDS = 12.0
"""Of measuring this machine, at least three rounds."""


def plan_for(
    engine: NetworkEngine, name: str, value: float, tick: Tick | None = None, stop: threading.Event | None = None
) -> Plan:
    """The plan for target_ms or target_gflops. Raises ValueError for a target that nothing keeps to."""

    def measured(done: int, total: int) -> None:
        if stop is not None and stop.is_set():
            raise Cancelled
        if tick:
            tick(done, total)

    if name == "target_ms" and engine.profile is None:
        with engine.lock:
            engine.profile = measure_profile(engine.model, batch_sizes=(1,), seconds=SECONDS, progress=measured)
    options: dict[str, Any] = {name: value} | ({"profile": engine.profile} if engine.profile else {})
    if engine.table is not None:
        options["table"] = engine.table.path
    return plan(engine.model, cache=0.0, **options)


def dial_of_plan(dial: Dial, best: Plan, counts: Sequence[int]) -> Dial:
    """`dial` with a plan's steps, budget and guidance."""
    changes: dict[str, Any] = {"steps": best.steps, "guidance": "none"}
    if counts:
        changes |= pieces_of("100%" if best.budget is None else str(best.budget), counts)
    if best.guidance is not None:
        assert best.guidance.kind in GUIDANCES
        changes |= {"guidance": best.guidance.kind, "scale": best.guidance.scale}
        if isinstance(best.guidance.budget, int):
            changes["guidance_budget"] = best.guidance.budget
    return replace(dial, **changes)
