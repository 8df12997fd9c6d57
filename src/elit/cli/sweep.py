"""elit sweep"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from elit.cli.checks import check_arguments, check_output
from elit.cli.evaluate import FIELD_COUNT, check_detectors, open_metrics, open_sampler
from elit.cli.main import check_device, show_notes, show_progress
from elit.cli.main import parse as parse_arguments
from elit.files import check_new_output, check_writable, leaving_nothing
from elit.pretrained import measurements_folder


@dataclass(frozen=True, kw_only=True)
class Args:
    """Score a model at many budgets, steps and guidances: one table, the Pareto front, a report with plots, and a model
    card. What is scored already, here or by elit evaluate with the same --out, is not scored again, and what a killed
    run has made is kept. Several processes share the work under accelerate launch or torchrun.

    Example: elit sweep runs/quickstart/model --reference digits --detector digits --count 200 --steps 4 8 16
    """

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a saved model or pipeline."""
    reference: Path | None = None
    """Real pictures, saved statistics, or ADM's .npz, as for elit evaluate."""
    detector: tuple[str, ...] = ("inception",)
    """One or more, as for elit evaluate."""
    metrics: tuple[str, ...] = ()
    """Of fid sfid fdd fvd fd is kid precision recall accuracy steady; default: what each detector is used for."""
    quality: str | None = None
    """The metric of plots, front and card; default: the first of the first detector."""
    out: Path = Path("runs/sweep")
    """Folder for sample sets, scores, the table, plots and report.html. Scores are kept and added to; table, plots and
    report are made of this line's settings, in the place of the last ones."""
    table: Path | None = None
    """Results, a row a setting and detector: Parquet where it ends in .parquet, else JSON lines; default:
    OUT/sweep.jsonl."""
    budgets: tuple[str, ...] = ("100%", "50%", "25%", "12.5%", "6.25%")
    """Latents per group (8; 1 is one latent), shares of them (50%), or all (100%)."""
    schedules: tuple[str, ...] = ()
    """Budgets that change over t, beside the fixed ones (50%@0-0.5,100%@0.5-1)."""
    steps: tuple[int, ...] = (40,)
    """Solver steps."""
    guidance: tuple[Literal["none", "cfg", "ag", "ccfg"], ...] = ("none", "ccfg")
    """Kinds; cfg drops the class in the second branch, ag lowers its budget, ccfg does both."""
    scales: tuple[float, ...] = (1.5,)
    """Guidance scales of every kind but none; 1 is off."""
    guidance_budget: str = "1"
    """Budget of the second branch of ag and ccfg: latents per group (1) or a share of them (25%)."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times between which guidance acts; 0 = noise, 1 = data."""
    caches: tuple[float, ...] = ()
    """Thresholds of step caching, beside none: a step reuses the last output while times have moved by less."""
    count: int = FIELD_COUNT
    """Samples a setting."""
    image_size: int | None = None
    """Cut the reference's pictures as ADM does; default: they are of one size."""
    labels: tuple[str, ...] = ()
    """Classes, by number or name of the samples, in turn; default: all of the model's."""
    prompts: tuple[str, ...] = ()
    """Texts, in turn, for a text-conditional model; accuracy takes the first for class 0, the second for class 1 and
    so on."""
    prompts_file: Path | None = None
    """A file with one text a line instead."""
    text_encoder: str | None = None
    """Hugging Face name or folder of the encoder that a text-conditional model was trained with; default: as saved."""
    solver: Literal["euler", "heun"] = "euler"
    """heun is second order and evaluates twice a step."""
    shift: float = 1.0
    """More of the steps near noise; 1 is even."""
    seed: int = 0
    """Seed of the first sample of every setting; the next ones count up."""
    vae: Path | None = None
    """Folder of the autoencoder that the model was trained in; default: the pipeline's, if it is one."""
    chunk: int = 32
    """Samples computed at once. Decides roundings, so part of the recipe."""
    batch_size: int = 256
    """Samples between two files, in whole chunks; changes no sample and no score."""
    device: str | None = None
    """Such as cuda or cpu; default: cuda where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the network; the solver's state and the detectors stay float32."""
    compile: bool = False
    """torch.compile on the network: worth it from some hundred samples on. Part of the recipe."""
    card: bool = True
    """Write MODEL/README.md; where there is one that no sweep has written, OUT/README.md. The table goes to
    MODEL/sweep.jsonl too, where elit.plan finds it."""
    overwrite: bool = False
    """Replace the file of --table that is there, and in MODEL the table of a sweep with another --out."""
    license: str = "unknown"
    """Of the weights, for the card, as the Hub names it, such as apache-2.0."""
    datasets: tuple[str, ...] = ()
    """Names on the Hub of the data that the model was trained on, for the card."""
    json: bool = False
    """Print where everything is, and the front, as JSON last on stdout."""


def parse(arguments: Sequence[str]) -> Args:
    args: Args = parse_arguments(Args, "sweep", arguments)
    check_arguments(args, count=2)
    _check(args)
    check_output(args.out)
    return args


def run(args: Args) -> dict[str, Any] | None:
    with show_notes("sweep"), leaving_nothing(args.out):
        return _run(args)


def _run(args: Args) -> dict[str, Any] | None:
    from accelerate import PartialState

    from elit.budgets import parse_budget
    from elit.evaluate.chunks import Share
    from elit.evaluate.sweep import make_settings, sweep, write_table

    state = PartialState(cpu=check_device(args.device) == "cpu")
    share = Share(state.process_index, state.num_processes, state.wait_for_everyone)
    device = args.device or str(state.device)
    sampler = open_sampler(args, args.model, device, args.out)
    settings, notes = make_settings(
        sampler,
        budgets=[*map(parse_budget, args.budgets if sampler.model.budgets else ("full",)), *args.schedules],
        steps=args.steps,
        guidance=args.guidance,
        scales=args.scales,
        guidance_budget=parse_budget(args.guidance_budget),
        interval=args.guidance_interval,
        caches=args.caches,
        solver=args.solver,
        shift=args.shift,
        seed=args.seed,
    )
    _check_tables(args)
    groups = open_metrics(args, device, args.out, share)
    if share.main:
        detector, quality = _quality(args, groups, sampler.planned(settings[0], args.count))
    options: dict[str, Any] = {"chunk": args.chunk, "batch_size": args.batch_size, "share": share}
    with show_progress(f"{len(settings)} settings", len(settings) * args.count) as progress:
        points, known = sweep(sampler, settings, groups, count=args.count, out=args.out, progress=progress, **options)
    if not share.main:
        return None
    table = args.table or args.out / "sweep.jsonl"
    write_table(points, table)
    if args.card:
        write_table(points, _models_table(args))
    of_detector = [point for point in points if point.detector == detector]
    result = _report(args, sampler, of_detector, quality, table)
    if not args.json:
        _print(of_detector, quality, known, notes, result)
    return {"points": len(points), "known": known, "notes": notes, **result}


def _check(args: Args) -> None:
    """What can be said before anything is loaded. Raises ValueError."""
    check_detectors(args)
    if args.table is not None and args.table.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"table={str(args.table)!r}: give a name that ends in .jsonl or .parquet")


def _models_table(args: Args) -> Path:
    """Where plans look for the table."""
    return measurements_folder(args.model) / "sweep.jsonl"


def _check_tables(args: Args) -> None:
    """Raises ValueError where a table would be lost that no sweep with this --out has written."""
    if args.table is not None:
        check_new_output(args.table, overwrite=args.overwrite, folder=False, name="table")
    if not args.card:
        return
    there, own = _models_table(args), args.table or args.out / "sweep.jsonl"
    check_writable(there, "model")
    same = there.is_file() and own.is_file() and there.read_bytes() == own.read_bytes()
    if there.exists() and not same and not args.overwrite:
        raise ValueError(
            f"model={str(args.model)!r}: {str(there)!r} is of another sweep than out={str(args.out)!r}; --overwrite to "
            "replace it, or --no-card to leave it"
        )


def _quality(args: Args, groups: Sequence[Any], example: Any) -> tuple[str, str]:
    """Specification of the detector and the metric that plots are of. Raises ValueError."""
    from elit.evaluate.score import possible_metrics

    scored = {
        group.specification: possible_metrics(example, group.detector, group.reference, group.metrics)
        for group in groups
    }
    for specification, metrics in scored.items():
        if args.quality is None or args.quality in metrics:
            return specification, args.quality or metrics[0]
    here = "; ".join(f"{name} scores {', '.join(metrics)}" for name, metrics in scored.items())
    raise ValueError(f"quality={args.quality!r}: {here}")


def _report(args: Args, sampler: Any, points: Sequence[Any], quality: str, table: Path) -> dict[str, Any]:
    """Writes report and card; returns where they are and the front, as --json prints it."""
    from elit.evaluate.plane import front_of
    from elit.evaluate.report.card import write_card
    from elit.evaluate.report.sweep import write_sweep_report

    grey = sampler.vae is None and sampler.model.config.in_channels == 1
    report = write_sweep_report(args.out, points, quality, model=args.model, grey=grey, table=table)
    card = None
    if args.card:
        reference = args.reference.name if args.reference else "none"
        known: dict[str, Any] = {"reference": reference, "license": args.license, "datasets": args.datasets}
        card = write_card(
            measurements_folder(args.model), sampler.model, points, quality, instead=args.out / "README.md", **known
        )
    return {
        "table": str(table),
        "report": str(report),
        "card": str(card) if card else None,
        "quality": quality,
        "front": {cost: [point.row() for point in front_of(points, quality, cost)] for cost in ("gflops", "ms")},
    }


def _print(points: Sequence[Any], quality: str, known: int, notes: Sequence[str], result: dict[str, Any]) -> None:
    """The front as a table, and where everything is."""
    from elit.evaluate.plane import front_of
    from elit.evaluate.report.sweep import cells, headings
    from elit.evaluate.report.tables import print_table

    for note in notes:
        print(f"elit sweep: note: {note}", file=sys.stderr)
    rows = [cells(point, [quality]) for point in front_of(points, quality, "gflops")]
    print_table(headings([quality]), rows, title=f"Pareto front of {len(points)} points, {quality} against GFLOPs")
    print(f"{known} scores were there already.")
    for name in ("table", "report", "card"):
        if result[name]:
            print(f"{name.capitalize()}: {result[name]}")
