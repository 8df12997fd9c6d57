"""Tests that plans keep their promise: predicted times, targets met, and the choice against measured quality.

    elit quickstart                                    # the model; two to four minutes
    python benchmarks/planner.py                       # half an hour on two cores, nothing else running
    python benchmarks/planner.py --quick               # a minute: shows that it runs

1. `elit profile`, then real runs of `elit.sample` at settings that the fit has not seen: mean error of the prediction.
2. `elit sweep` of the model on its digits: the table that plans go by.
3. Ten targets between the cheapest and the dearest measured setting: the plan for each is run and timed (overshoot) and
   scored with other seeds than the sweep's. So are the five settings of the sweep that were best of those that keep to
   the target, and "full budget, fewer steps": as many as fit, without guidance and with CFG at the plan's scale.

A plan is on the measured front within noise where no setting of the sweep that keeps to the target is better by more
than twice the spread of the score, which is that of the same setting over other seeds.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import elit
from elit.evaluate.chunks import Work
from elit.evaluate.detectors import open_detector
from elit.evaluate.reference import open_reference
from elit.evaluate.samples import Sampler
from elit.evaluate.score import MetricGroup, score
from elit.evaluate.sweep import make_settings, sweep, write_table
from elit.files import write_text
from elit.flow.guidance import Guidance
from elit.planner.choose import Plan, Pricing
from elit.planner.profile import Case, Profile, case_row, held_out, machine, measure_profile, time_runs
from elit.planner.quality import Quality, read_quality
from elit.sampling.settings import Sampling

RESULT = Path(__file__).parent / "results/planner.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/quickstart/model"))
    parser.add_argument("--work", type=Path, default=Path("runs/planner"), help="sample sets and scores; kept")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/planner.json, with --quick none")
    parser.add_argument("--batch", type=int, default=4, help="images at a time, for the targets")
    parser.add_argument("--targets", type=int, default=10)
    parser.add_argument("--count", type=int, default=200, help="samples a score")
    parser.add_argument("--seconds", type=float, default=90, help="of measuring, for the profile and for each check")
    parser.add_argument("--quick", action="store_true", help="few settings, few samples")
    args = parser.parse_args()
    if args.quick:
        args.count, args.seconds, args.targets = min(args.count, 32), 0.0, min(args.targets, 3)

    start = time.perf_counter()
    model = elit.load_model(args.model).eval()
    profile = measure_profile(model, seconds=args.seconds)
    unseen = check_predictions(model, profile, 4 if args.quick else 24, args.seconds)
    study = Study(model, args, profile)
    targets = check_targets(study)
    content: dict[str, Any] = {
        "command": " ".join(["python benchmarks/planner.py", *sys.argv[1:]]),
        "versions": {"elit": elit.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "hardware": f"{machine(model.device)}, {torch.get_num_threads()} threads",
        "seconds": round(time.perf_counter() - start),
        **profile.cost,
        "profile": {"error_fitted": profile.error(held_out=False), "error_held_out": profile.error(held_out=True)},
        "noise": {study.quality.metric: study.noise},
        "summary": summary(unseen, targets, study),
        "unseen": unseen,
        "targets": targets,
    }
    for name, value in content["summary"].items():
        print(f"{name}: {value:.4g}")
    if out := args.out or (None if args.quick else RESULT):
        write_text(out, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        print(f"Result: {out}")


def check_predictions(model: Any, profile: Profile, count: int, seconds: float) -> list[dict[str, Any]]:
    """Part 1: settings between those of the grid, others than the profile's own held-out ones."""
    seen = [(Sampling.from_dict(row), row["batch"]) for row in profile.rows]
    cases: list[Case] = []
    while len(cases) < count:
        cases += held_out(model.budgets, (1, 8), [*seen, *cases])
    cases = cases[:count]
    taken, rounds = time_runs(model, cases, seconds=seconds)
    rows = []
    for (sampling, batch), ms in zip(cases, taken, strict=True):
        predicted = profile.predict(model, sampling, batch)
        error = predicted / ms - 1
        rows.append(
            {**case_row((sampling, batch)), "ms": ms, "predicted_ms": predicted, "error": error, "rounds": rounds}
        )
    return rows


class Study:
    """A sweep of the model, the table that comes of it, and scores with other seeds than its own."""

    def __init__(self, model: Any, args: argparse.Namespace, profile: Profile):
        self.model, self.args, self.profile = model, args, profile
        budgets = [model.budgets[-1], model.budgets[len(model.budgets) // 2 - 1], *model.budgets[3:0:-2]]
        steps: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
        scales: tuple[float, ...] = (1.5, 2.5)
        if args.quick:
            budgets, steps, scales = budgets[:2], (2, 8), (1.5,)
        detector = open_detector("digits")
        args.work.mkdir(parents=True, exist_ok=True)
        work = Work(out=args.work)
        self.metrics = MetricGroup("digits", detector, open_reference(Path("digits"), detector, work), ("fd",))
        self.sampler = Sampler(model, work)
        guidance = [None, *(elit.CCFG(scale, model.budgets[0]) for scale in scales)]
        schedules = [f"{model.budgets[0]}@0-0.5,{model.budgets[-1]}@0.5-1"]
        settings = make_settings(self.sampler, budgets=[*budgets, *schedules], steps=steps, guidance=guidance)
        points, _ = sweep(self.sampler, settings, [self.metrics], count=args.count)
        write_table(points, args.work / "sweep.jsonl")
        self.quality: Quality = read_quality(args.work / "sweep.jsonl")
        self.price = Pricing(model, args.batch, profile)
        self.measured = [
            self.price.plan(curve.sampling(steps), metric=self.quality.metric, quality=value)
            for curve in self.quality.curves
            for steps, value in zip(curve.steps, curve.values, strict=True)
        ]
        ranked = sorted(self.measured, key=lambda each: self.quality.loss(each.quality or 0.0))
        some = ranked[:: max(1, len(ranked) // 4)]
        self.noise = statistics.median(statistics.stdev(self.score(each, seed) for seed in (1, 2, 3)) for each in some)

    def score(self, plan: Plan, other: int = 1) -> float:
        """Scores of samples with other seeds than the sweep's."""
        seed = other * 1_000_000
        sampling = elit.Sampling(steps=plan.steps, budget=plan.budget, guidance=plan.guidance, seed=seed)
        samples = self.sampler.make(sampling, self.args.count)
        result = score(samples, self.metrics, self.sampler.work)
        assert result is not None
        return result.scores["fd"]


def check_targets(study: Study) -> list[dict[str, Any]]:
    """Parts 2 and 3, for targets evenly spaced in the logarithm of the time."""
    times = sorted(plan.ms or 0.0 for plan in study.measured)
    count, low, high = study.args.targets, times[0] * 1.1, times[-1] * 0.9
    targets = [low * (high / low) ** (i / max(count - 1, 1)) for i in range(count)]
    options: dict[str, Any] = {"batch": study.args.batch, "profile": study.profile, "table": study.quality.path}
    plans = [elit.plan(study.model, target_ms=target, **options) for target in targets]
    taken = time_plans(study, plans)
    return [judge(study, *each) for each in zip(targets, plans, taken, strict=True)]


def time_plans(study: Study, plans: list[Plan]) -> list[float]:
    """Median milliseconds of each plan's run, in interleaved rounds after one that warms up."""
    y = study.model.conditioning.example(study.args.batch)
    taken: list[list[float]] = [[] for _ in plans]
    begin, rounds = time.perf_counter(), 0
    while rounds < 4 or time.perf_counter() - begin < study.args.seconds:
        for plan, times in zip(plans, taken, strict=True):
            start = time.perf_counter()
            elit.sample(study.model, y, plan=plan)
            times.append(1e3 * (time.perf_counter() - start))
        rounds += 1
    return [statistics.median(times[1:]) for times in taken]


def judge(study: Study, target: float, plan: Plan, ms: float) -> dict[str, Any]:
    """A plan beside the settings of the sweep that keep to its target, all scored with seeds new to the sweep."""
    fitting = [each for each in study.measured if (each.ms or 0.0) <= target]
    best = sorted(fitting, key=lambda each: study.quality.loss(each.quality or 0.0))[:5]
    front = min(study.score(each) for each in best)
    scales = [None] if plan.guidance is None else [None, elit.CFG(plan.guidance.scale)]
    plain = [each for each in (most_steps(study, target, guidance) for guidance in scales) if each]
    full = min(((study.score(each), each) for each in plain), key=lambda pair: pair[0], default=None)
    value = study.score(plan)
    return {
        "target_ms": target,
        "plan": plan.describe(),
        "predicted_ms": plan.ms,
        "ms": ms,
        "overshoot": ms / target - 1,
        "predicted_fd": plan.quality,
        "fd": value,
        "front_fd": front,
        "on_front": value <= front + 2 * study.noise,
        "full": full and full[1].describe(),
        "full_fd": full and full[0],
    }


def most_steps(study: Study, target: float, guidance: Guidance | None) -> Plan | None:
    """All latents and as many steps as keep to the target."""
    plans = [
        study.price.plan(Sampling(steps=steps, budget=study.model.budgets[-1], guidance=guidance))
        for steps in range(64, 0, -1)
    ]
    return next((each for each in plans if (each.ms or 0.0) <= target), None)


def summary(unseen: list[dict[str, Any]], targets: list[dict[str, Any]], study: Study) -> dict[str, float]:
    """Figures of the results that the acceptance is about."""
    overshoot = [row["overshoot"] for row in targets]
    both = [row for row in targets if row["full_fd"] is not None]
    ratios = [row["fd"] / row["full_fd"] for row in both]
    return {
        "mean error of predicted time": statistics.mean(abs(row["error"]) for row in unseen),
        "settings": len(unseen),
        "overshoot, median": statistics.median(overshoot),
        "overshoot, worst": max(overshoot),
        "targets": len(targets),
        "plans on the measured front": sum(row["on_front"] for row in targets),
        "fd of plans over that of full budget, fewer steps, geometric mean": statistics.geometric_mean(ratios),
        "targets at which the plan is better": sum(ratio < 1 for ratio in ratios),
        "targets that full budget can keep to": len(both),
    }


if __name__ == "__main__":
    main()
