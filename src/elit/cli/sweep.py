"""elit sweep"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from accelerate import PartialState

from elit.budgets import ANY_COUNT, parse_budget, schedule_budgets
from elit.cli.main import Output, check_device, show_progress
from elit.config import WAIT, require, require_counts
from elit.evaluate.report import cells, headings, write_card, write_sweep_report
from elit.evaluate.score import FIELD_COUNT, Scoring
from elit.evaluate.sweep import front_of, make_settings, sweep, write_table
from elit.evaluate.tables import print_table
from elit.files import Json, check_writable, leaving_nothing
from elit.flow.guidance import make_guidance
from elit.pretrained import measurements_folder
from elit.sampling.settings import STEPS, GuidanceKind, Sampling, Solver


@dataclass(frozen=True, kw_only=True)
class Args(Scoring, Output):
    """Score a model at many budgets, steps and guidances: one table, the Pareto front, a report with plots, and a model
    card. A score that is there already, from here or from elit evaluate with the same --out, is not computed again, and
    the work of a killed run is kept. Several processes share the work under accelerate launch or torchrun.

    Example: elit sweep runs/quickstart/model --reference digits --detector digits --count 200 --steps 4 8 16
    """

    model: Annotated[Path, tyro.conf.Positional]  # Folder of a saved model or pipeline.
    quality: str | None = None  # The metric of plots, front and card; default: the first of the first detector.
    out: Path = Path("runs/sweep")  # Folder for scores, which are added to, and this table, its plots and report.html.
    budgets: tuple[str, ...] = ("100%", "50%", "25%", "12.5%", "6.25%")  # Latents per window (8) or shares (50%).
    schedules: tuple[str, ...] = ()  # Budgets that change over t, beside the fixed ones (50%@0-0.5,100%@0.5-1).
    steps: tuple[int, ...] = (STEPS,)  # Solver steps.
    guidance: tuple[GuidanceKind, ...] = ("none", "ccfg")
    """cfg drops the second branch's class, ag lowers its latents where the first has more, ccfg does both."""
    scales: tuple[float, ...] = (1.5,)  # Guidance scales of every kind but none; 1 is off.
    guidance_budget: str = "1"  # Second branch of ag and ccfg: latents per window (1) or a share of them (25%).
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # Times between which guidance acts; 0 = noise, 1 = data.
    caches: tuple[float, ...] = ()  # Thresholds of step caching, beside none; see elit sample --cache.
    count: int = FIELD_COUNT  # Samples a setting.
    solver: Solver = "euler"  # heun is second order and evaluates twice a step.
    shift: float = 1.0  # More of the steps near noise; 1 is even.
    seed: int = 0  # Seed of the first sample of every setting; the next ones count up.
    card: bool = True  # Write MODEL/README.md, unless it is yours, and MODEL/sweep.jsonl, where elit.plan finds it.
    license: str = "unknown"  # License of the weights, for the card, as the Hub names it, such as apache-2.0.
    datasets: tuple[str, ...] = ()  # Names on the Hub of the data that the model was trained on, for the card.

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "steps")
        require_counts(self, "count", least=2)
        for name in ("budgets", "steps", "guidance", "scales"):
            require(bool(getattr(self, name)), name, "none", "at least one")
        for budget in (*self.budgets, *self.schedules):
            schedule_budgets(budget, [0.0], ANY_COUNT)


def run(args: Args) -> Json | None:
    check_writable(args.out)
    folder, table = measurements_folder(args.model), args.out / "sweep.jsonl"
    with leaving_nothing(args.out):
        state = PartialState(cpu=check_device(args.device) == "cpu", timeout=WAIT)
        work, device = args.work(args.out, state), args.device or str(state.device)
        sampler = args.open_sampler(args.model, device, work)
        settings = make_settings(
            sampler,
            budgets=[*map(parse_budget, args.budgets if sampler.model.budgets else ("full",)), *args.schedules],
            steps=args.steps,
            guidance=[
                make_guidance(kind, scale, args.guidance_budget, args.guidance_interval)
                for kind in args.guidance
                for scale in (args.scales if kind != "none" else (1.0,))
            ],
            caches=(0.0, *args.caches),
            like=Sampling(solver=args.solver, shift=args.shift, seed=args.seed),
        )
        if args.card:
            _check_models_table(folder / "sweep.jsonl", table, args)
        groups = args.open_metrics(device, work)
        if work.main:
            example = sampler.planned(settings[0], args.count)
            offers = [(group.specification, metric) for group in groups for metric in group.possible(example)]
            wanted = [each for each in offers if args.quality in (None, each[1])]
            require(bool(wanted), "quality", args.quality, f"any of {', '.join(metric for _, metric in offers)}")
            detector, quality = wanted[0]
        with show_progress(f"{len(settings)} settings", len(settings) * args.count) as progress:
            points, known = sweep(sampler, settings, groups, count=args.count, progress=progress)
    if not work.main:
        return None
    write_table(points, table)
    shown = [point for point in points if point.detector == detector]
    grey = sampler.vae is None and sampler.model.config.in_channels == 1
    report = write_sweep_report(args.out, shown, quality, model=args.model, grey=grey)
    files: Json = {"table": str(table), "report": str(report), "card": None}
    if args.card:
        write_table(points, folder / "sweep.jsonl")
        reference = args.reference.name if args.reference else "none"
        about: Json = {"reference": reference, "license": args.license, "datasets": args.datasets}
        files["card"] = str(write_card(folder, sampler.model, shown, quality, instead=args.out / "README.md", **about))
    front = {cost: front_of(shown, quality, cost) for cost in ("gflops", "ms")}
    if not args.json:
        title = f"Pareto front of {len(shown)} points, {quality} against GFLOPs"
        print_table(headings([quality]), [cells(point, [quality]) for point in front["gflops"]], title=title)
        print(f"{known} scores were there already.")
        print("".join(f"{name.capitalize()}: {path}\n" for name, path in files.items() if path), end="")
    rows = {cost: [point.row() for point in of_cost] for cost, of_cost in front.items()}
    return {"points": len(points), "known": known, **files, "quality": quality, "front": rows}


def _check_models_table(there: Path, own: Path, args: Args) -> None:
    """Raises ValueError where a table beside the model would be lost that no sweep with this --out has written."""
    check_writable(there, "model")
    same = there.is_file() and own.is_file() and there.read_bytes() == own.read_bytes()
    if there.exists() and not same and not args.overwrite:
        other = f"the table of another sweep than out={str(args.out)!r}: add --overwrite, or --no-card to leave it"
        raise ValueError(f"cannot replace {str(there)!r}, {other}")
