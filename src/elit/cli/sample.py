"""elit sample"""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from elit.cli.main import Output, check_device, option_value, parse as parse_arguments, show_progress
from elit.cli.options import OfNetwork, SamplingArgs
from elit.cli.profile import measured
from elit.config import require, require_counts
from elit.costs.timing import wait_for
from elit.elastic.engine import load_engine
from elit.files import Json, check_new_output, check_writable
from elit.planner.choose import Plan, find_profile, make_target, network_folder, plan
from elit.pretrained import model_name
from elit.sampling.engine import Engine, NetworkEngine, NetworkRun, Run, conditions_of, take
from elit.sampling.pictures import PictureRecord, Subject, is_sample, make_record, output_kind, read_text, write_samples
from elit.sampling.settings import Sampling

MAX_COUNT = 64  # Images of a run that does not say how many.
TARGETS = ("target_ms", "target_images_per_s", "target_gflops")
PLANNED = (  # settings that a plan decides
    *("budget", "step_budgets", "sample_budgets", "guidance", "scale", "guidance_budget", "guidance_interval"),
    *("steps", "solver", "shift"),
)


@dataclass(frozen=True, kw_only=True)
class Args(Subject, SamplingArgs, OfNetwork, Output):
    """Make images or clips with a trained model, at any budget and with any guidance. A picture holds the settings that
    it was made with; --like makes it again.

    With a target the settings are planned: from elit profile's measurements, made first where there are none, and the
    table of elit sweep in the model's folder or beside it, if there is one.

    Example: elit sample runs/quickstart/model --labels 3 7 --count 16 --budget 50% --guidance ccfg --scale 2
    """

    model: Annotated[Path, tyro.conf.Positional]  # Folder of a saved model or pipeline; with --like the picture's own.
    step_budgets: tuple[str, ...] = ()  # Instead of one budget, one a step.
    sample_budgets: tuple[str, ...] = ()  # Instead of one budget, one an image; that many images are made.
    out: Path = Path("samples.png")  # A .png, .jpg or .webp grid; a .gif or .webp of clips; a folder; a .npz of uint8.
    like: Path | None = None  # A picture that elit made: make it again; options that are given change its settings.
    target_ms: float | None = None  # Plan steps, budget and guidance: the ms a batch may take, autoencoder apart.
    target_images_per_s: float | None = None  # The same as a rate.
    target_gflops: float | None = None  # The same for the FLOPs of an image.
    vae: Path | None = None  # Folder of the autoencoder that the model was trained in; default: the pipeline's.
    compile: bool = False  # Compile the network first: worth its minutes for many images, or large ones.

    def __post_init__(self) -> None:
        Subject.__post_init__(self)
        SamplingArgs.__post_init__(self)
        require_counts(self, "count", "batch_size")
        if self.targets:
            if given := [name for name in PLANNED if getattr(self, name) != getattr(Args, name)]:
                raise ValueError(f"cannot use {given[0]} with a target, which plans it")
            make_target(1, **self.targets)
        self.sampling()

    @property
    def targets(self) -> Json:
        return {name: getattr(self, name) for name in TARGETS if getattr(self, name) is not None}

    def sampling(self) -> Sampling:
        return Sampling.from_dict(vars(self))


def parse(arguments: Sequence[str]) -> Args:
    """With --like, the options that made the picture are the defaults."""
    options: Json = {}
    if like := option_value(arguments, "--like"):
        record = read_record(Path(like))
        plain = vars(record.subject) | record.sampling.to_dict()
        settings: Json = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
        settings |= {"dtype": record.sampling.dtype or "float32", "compile": "compile" in record.made_with}
        options = {"default": Args(model=Path(record.model), **settings)}
    return parse_arguments(Args, "sample", arguments, **options)


def read_record(path: Path) -> PictureRecord:
    """Raises ValueError where there is no picture, or no record in it."""
    text = read_text(path)
    if text is None:
        raise ValueError(f"like must be a picture that elit wrote, got {str(path)!r}, which has no settings in it")
    try:
        return PictureRecord.from_text(text)
    except ValueError as error:
        raise ValueError(f"cannot make {str(path)!r} again: {error}") from None


def run(args: Args) -> Json:
    check_writable(args.out)
    device = torch.device(check_device(args.device))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as in training
    options: Json = {"vae": args.vae, "text_encoder": args.text_encoder, "compile": args.compile}
    engine = load_engine(args.model, name=model_name(args.model), device=device, dtype=args.dtype, **options)
    text = engine.takes_text or not args.text_encoder
    require(text, "text_encoder", args.text_encoder, "left out for this model, which takes classes")
    record, row = make_record(engine, args.sampling(), args), None
    if args.like is not None:
        before = read_record(args.like)
        same = before.model == record.model and before.sampling.dtype == record.sampling.dtype
        if same and before.weights != record.weights:
            fault = f"it was made by other weights than {before.model} has now; name the model that made it"
            raise ValueError(f"cannot make {str(args.like)!r} again: {fault}")
        row = before.row
    kind = output_kind(args.out, pictures=engine.makes_pictures)  # before the work, not after it
    check_new_output(args.out, overwrite=args.overwrite, folder=kind == "folder", mine=is_sample)

    conditions = conditions_of(engine, args.labels, args.prompts)
    count = args.count or len(args.sample_budgets) or min(len(conditions), MAX_COUNT)
    require(row is None or row < count, "count", count, f"above {row}, the number of the picture")
    size = args.batch_size if isinstance(engine, NetworkEngine) else 1
    best = planned(args, engine, min(count, size)) if args.targets else None
    sampling = replace(best, seed=args.seed, dtype=args.dtype) if best else args.sampling()
    gflops = engine.gflops(sampling)

    def begin(first: int) -> Run:
        rows = range(first, min(first + size, count))
        budgets = sampling.sample_budgets[first : first + size]
        seeds = [sampling.seed + row for row in rows]
        return engine.begin(take(conditions, rows), seeds, replace(sampling, sample_budgets=budgets))

    warm = begin(0) if best else None  # a target is not for the first run, which prepares kernels and memory
    while warm and not warm.done:
        warm.step()
    starts = range(0, count, size) if row is None else [row // size * size]
    made, seconds, total = [], 0.0, len(starts) * sampling.steps
    with show_progress("sampling", total) as progress:
        for number, first in enumerate(starts):
            start = time.perf_counter()
            run = begin(first)
            while not run.done:
                run.step()
                progress(number * sampling.steps + run.steps_done, total)
            wait_for(device)
            seconds += time.perf_counter() - start
            latents = isinstance(run, NetworkRun) and not engine.makes_pictures
            made.append(run.x.cpu() if latents else run.pictures())
    x = torch.cat(made)
    if row is not None:
        x = x[row - starts[0] :][:1]
    if not x.isfinite().all():
        raise FloatingPointError("the samples are not finite: give a smaller scale, or another dtype")

    def describe(number: int | None) -> str:
        return replace(record, sampling=sampling, row=number if row is None else row).to_text()

    write_samples(x, args.out, pictures=engine.makes_pictures, single=row is not None, describe=describe)
    ms = 1e3 * seconds / len(x)
    if not args.json:
        print(f"{args.out}: {len(x)} {'clips' if engine.clips else 'images'}, {gflops:.3f} GFLOPs and {ms:.1f} ms each")
    expected = best and {name: getattr(best, name) for name in ("words", "ms", "metric", "quality")}
    return {"out": str(args.out), "count": len(x), "gflops_per_image": gflops, "ms_per_image": ms, "plan": expected}


def planned(args: Args, engine: Engine, batch: int) -> Plan:
    """The plan for the target; measures this machine if it has no profile of the model."""
    if not isinstance(engine, NetworkEngine):
        raise ValueError(f"{next(iter(args.targets))} is not supported for pipelines of diffusers")
    model, folder = engine.network, network_folder(args.model) or args.model
    profile = find_profile(model, folder, compile=args.compile)
    if profile is None and args.target_gflops is None:
        print("elit sample: note: no profile of this machine yet; measuring for half a minute", file=sys.stderr)
        sizes = sorted({1, batch, *(size for size in (2, 4, 8) if size < batch)})
        profile = measured(model, batch_sizes=sizes, seconds=30.0, compile=args.compile)
        with suppress(OSError):  # of a folder that is not the user's
            profile.save(folder)
    best = plan(model, batch=batch, profile=profile, cache=args.cache or None, compile=args.compile, **args.targets)
    if not args.json:
        print(best)
    return best
