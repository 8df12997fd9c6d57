"""The dial of the multi-budget network: FD at every budget, schedules over t, and step caching."""

import itertools
from collections.abc import Sequence
from typing import Any

from scores import draw_and_score
from study import Study

BUDGETS = (16, 8, 4, 2, 1)
SCHEDULES = ("25%@0-0.5,100%@0.5-1", "100%@0-0.5,25%@0.5-1")
CACHES = (0.1, 0.3)
STEPS = 24


def main(line: Sequence[str] | None = None) -> None:
    study = Study("dial", __doc__, line)
    for seed in study.args.seeds:
        step, model = study.network("ELIT multi-budget", seed)
        settings: dict[str, dict[str, Any]] = {f"{budget} of 16": {"budget": budget} for budget in BUDGETS}
        settings |= {schedule: {"budget": schedule} for schedule in SCHEDULES}
        settings |= {f"cache {threshold}": {"cache": threshold} for threshold in CACHES}
        for name, setting in settings.items():
            key = {"arm": "dial", "seed": seed, "step": step, "name": name, "samples": study.args.samples}
            make = lambda setting=setting: draw_and_score(model, count=study.args.samples, steps=STEPS, **setting)  # noqa: E731, B023
            study.row(name, seed, study.scores.get(key, make))
    for more, fewer in itertools.pairwise(BUDGETS):
        says = f"{more} of 16 latents are no worse than {fewer}, to 2%"
        study.compare(says, f"{more} of 16", f"{fewer} of 16", allowed=0.02)
    study.write(f"multi-budget ELIT, {STEPS} Euler steps, no guidance")


if __name__ == "__main__":
    main()
