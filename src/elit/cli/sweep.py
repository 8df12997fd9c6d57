"""elit sweep"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from accelerate import PartialState

from elit.budgets import ANY_COUNT, parse_budget, schedule_budgets
from elit.cli.main import Output, check_device, show_notes, show_progress
from elit.cli.options import check_guidance_is_used
from elit.config import WAIT, require, require_counts
from elit.evaluate.plane import Point, front_of, write_table
from elit.evaluate.report.sweep import cells, headings, write_card, write_sweep_report
from elit.evaluate.report.tables import print_table
from elit.evaluate.samples import Sampler
from elit.evaluate.score import FIELD_COUNT, Scoring
from elit.evaluate.sweep import make_settings, sweep
from elit.files import Json, check_new_output, check_writable, leaving_nothing
from elit.flow.guidance import make_guidance
from elit.pretrained import measurements_folder
from elit.sampling.settings import GuidanceKind, Sampling, Solver


@dataclass(frozen=True, kw_only=True)
class Args(Scoring, Output):
    """Score a model at many budgets, steps and guidances: one table, the Pareto front, a report with plots, and a model
    card. A score that is there already, from here or from elit evaluate with the same --out, is not computed again, and
    the work of a killed run is kept. Several processes share the work under accelerate launch or torchrun.

    Example: elit sweep runs/quickstart/model --reference digits --detector digits --count 200 --steps 4 8 16
    """

    model: Annotated[Path, tyro.conf.Positional]  # Folder of a saved model or pipeline.
    quality: str | None = None  # The metric of plots, front and card; default: the first of the first detector.
    out: Path = Path("runs/sweep")
    """Folder for sample sets, scores, the table, plots and report.html. Scores are kept and added to; table, plots and
    report hold this command's settings and replace the last ones."""
    table: Path | None = None  # A row a setting and detector, .parquet or JSON lines; default: OUT/sweep.jsonl.
    budgets: tuple[str, ...] = ("100%", "50%", "25%", "12.5%", "6.25%")  # Latents per window (8) or shares (50%).
    schedules: tuple[str, ...] = ()  # Budgets that change over t, beside the fixed ones (50%@0-0.5,100%@0.5-1).
    steps: tuple[int, ...] = (40,)  # Solver steps.
    guidance: tuple[GuidanceKind, ...] = ("none", "ccfg")  # cfg drops the second branch's class, ag latents, ccfg both.
    scales: tuple[float, ...] = (1.5,)  # Guidance scales of every kind but none; 1 is off.
    guidance_budget: str = "1"  # Second branch of ag and ccfg: latents per window (1) or a share of them (25%).
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # Times between which guidance acts; 0 = noise, 1 = data.
    caches: tuple[float, ...] = ()  # Thresholds of step caching, beside none; see elit sample --cache.
    count: int = FIELD_COUNT  # Samples a setting.
    solver: Solver = "euler"  # heun is second order and evaluates twice a step.
    shift: float = 1.0  # More of the steps near noise; 1 is even.
    seed: int = 0  # Seed of the first sample of every setting; the next ones count up.
    card: bool = True
    """Write MODEL/README.md, or OUT/README.md beside a README.md that no sweep wrote. The table goes to
    MODEL/sweep.jsonl too, where elit.plan finds it."""
    license: str = "unknown"  # License of the weights, for the card, as the Hub names it, such as apache-2.0.
    datasets: tuple[str, ...] = ()  # Names on the Hub of the data that the model was trained on, for the card.

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "steps")
        require_counts(self, "count", least=2)
        for name in ("budgets", "steps", "guidance"):
            require(bool(getattr(self, name)), name, "none", "at least one")
        for budget in (*self.budgets, *self.schedules):
            schedule_budgets(budget, [0.0], ANY_COUNT)
        table = self.table
        require(table is None or table.suffix in (".jsonl", ".parquet"), "table", str(table), "a .jsonl or .parquet")
        guided = [kind for kind in self.guidance if kind != "none"]
        require(bool(self.scales) or not guided, "scales", "none", f"at least one for {', '.join(guided)}")
        check_guidance_is_used(self, self.guidance, "scales")

    @property
    def own_table(self) -> Path:
        return self.table or self.out / "sweep.jsonl"

    @property
    def models_table(self) -> Path:
        return measurements_folder(self.model) / "sweep.jsonl"


def run(args: Args) -> Json | None:
    check_writable(args.out)
    with show_notes("sweep"), leaving_nothing(args.out):
        state = PartialState(cpu=check_device(args.device) == "cpu", timeout=WAIT)
        work, device = args.work(args.out, state), args.device or str(state.device)
        sampler = args.open_sampler(args.model, device, work)
        settings, notes = make_settings(
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
        _check_tables(args)
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
    for path in {args.own_table, *([args.models_table] if args.card else [])}:
        write_table(points, path)
    of_detector = [point for point in points if point.detector == detector]
    files = _report(args, sampler, of_detector, quality)
    if not args.json:
        for note in notes:
            print(f"elit sweep: note: {note}", file=sys.stderr)
        rows = [cells(point, [quality]) for point in front_of(of_detector, quality, "gflops")]
        title = f"Pareto front of {len(of_detector)} points, {quality} against GFLOPs"
        print_table(headings([quality]), rows, title=title)
        print(f"{known} scores were there already.")
        print("".join(f"{name.capitalize()}: {path}\n" for name, path in files.items() if path), end="")
    front = {cost: [point.row() for point in front_of(of_detector, quality, cost)] for cost in ("gflops", "ms")}
    return {"points": len(points), "known": known, "notes": notes, **files, "quality": quality, "front": front}


def _check_tables(args: Args) -> None:
    """Raises ValueError where a table would be lost that no sweep with this --out has written."""
    if args.table is not None:
        check_new_output(args.table, overwrite=args.overwrite, name="table")
    if not args.card:
        return
    there, own = args.models_table, args.own_table
    check_writable(there, "model")
    same = there.is_file() and own.is_file() and there.read_bytes() == own.read_bytes()
    if there.exists() and not same and not args.overwrite:
        other = f"the table of another sweep than out={str(args.out)!r}: add --overwrite, or --no-card to leave it"
        raise ValueError(f"cannot replace {str(there)!r}, {other}")


def _report(args: Args, sampler: Sampler, points: Sequence[Point], quality: str) -> Json:
    grey, table = sampler.vae is None and sampler.model.config.in_channels == 1, args.own_table
    report = write_sweep_report(args.out, points, quality, model=args.model, grey=grey, table=table)
    files: Json = {"table": str(table), "report": str(report), "card": None}
    if args.card:
        reference = args.reference.name if args.reference else "none"
        about: Json = {"reference": reference, "license": args.license, "datasets": args.datasets}
        folder, instead = measurements_folder(args.model), args.out / "README.md"
        files["card"] = str(write_card(folder, sampler.model, points, quality, instead=instead, **about))
    return files
