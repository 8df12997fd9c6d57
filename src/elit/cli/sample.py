"""elit sample"""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from elit.cli.checks import check_arguments, check_output, check_sample_files
from elit.cli.main import check_device, show_progress
from elit.cli.main import parse as parse_arguments
from elit.flow.guidance import make_guidance
from elit.sampling.settings import SampleRecord, SampleSettings


@dataclass(frozen=True, kw_only=True)
class Args(SampleSettings):
    """Make images or clips with a trained model, at any budget and with any guidance. A picture holds the settings that
    it was made with; --like makes it again.

    With a target the settings are planned: from elit profile's measurements, made first where there are none, and the
    table of elit sweep in the model's folder or beside it, if there is one.

    Example: elit sample runs/quickstart/model --labels 3 7 --count 16 --budget 50% --guidance ccfg --scale 2
    """

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a saved model or pipeline; with --like by default the one that the picture names."""
    out: Path = Path("samples.png")
    """A .png, .jpg or .webp for one grid (of clips, their frames side by side), a .gif or .webp for moving clips, a
    folder for separate files, or a .npz for an array (uint8, N×H×W×3, as the ADM evaluator reads; float32 latents if
    there is no autoencoder)."""
    overwrite: bool = False
    """Replace what is there, once the new is whole."""
    like: Path | None = None
    """A picture that elit made: take its settings, bit for bit on the same machine and versions. Options that are given
    beside it change those settings."""
    row: int | None = None
    """Make only this one of the images, counted from 0; of a picture from a folder of samples, its own."""
    target_ms: float | None = None
    """Plan steps, budget and guidance: milliseconds that one batch may take, without autoencoder and files."""
    target_images_per_s: float | None = None
    """The same as a rate."""
    target_gflops: float | None = None
    """The same for the FLOPs of an image."""
    vae: Path | None = None
    """Folder of the autoencoder that the model was trained in; default: the pipeline's, if `model` is one."""
    device: str | None = None
    """Such as cuda or cpu; default: cuda where there is one."""
    compile: bool = False
    """Compile the network first: worth its minutes for many images, or large ones."""
    json: bool = False
    """Print what was made as JSON last on stdout."""


# Settings that a plan decides.
PLANNED = (
    "budget",
    "step_budgets",
    "sample_budgets",
    "guidance",
    "scale",
    "guidance_budget",
    "guidance_interval",
    "steps",
    "solver",
    "shift",
)
TARGETS = ("target_ms", "target_images_per_s", "target_gflops")


def parse(arguments: Sequence[str]) -> Args:
    record = liked(arguments)
    options: dict[str, Any] = {}
    if record is not None:
        compiled = "compile" in record.made_with
        known: dict[str, Any] = {"model": Path(record.model), "row": record.row, "compile": compiled}
        options = {"default": Args(**known, **vars(record.settings))}
    args: Args = parse_arguments(Args, "sample", arguments, **options)
    given = [name for name in TARGETS if getattr(args, name) is not None]
    wrong = [name for name in PLANNED if getattr(args, name) != getattr(Args, name)]
    if given and wrong:
        raise ValueError(f"{given[0]}, {wrong[0]}: a target plans {', '.join(PLANNED)}; leave {wrong[0]} out")
    check_arguments(args)
    check_sample_files(args.out)
    check_output(args.out)
    return args


def liked(arguments: Sequence[str]) -> SampleRecord | None:
    """What the picture named by --like says; its settings are the defaults of all other options."""
    given = [following for option, following in itertools.pairwise(arguments) if option == "--like"]
    given += [option.removeprefix("--like=") for option in arguments if option.startswith("--like=")]
    return read_record(Path(given[-1])) if given else None


def read_record(path: Path) -> SampleRecord:
    """Raises ValueError where there is no picture, or it does not say how it was made."""
    from elit.sampling.pictures import read_text

    try:
        text = read_text(path)
    except ValueError as error:
        raise ValueError(f"like={error}") from None
    if text is None:
        raise ValueError(f"like={str(path)!r}: says nothing of how it was made; give a picture that elit wrote")
    return SampleRecord.from_text(text, f"like={str(path)!r}")


def run(args: Args) -> dict[str, Any]:
    import time

    import torch

    from elit.elastic.load import is_stock_pipeline

    if is_stock_pipeline(args.model):
        return run_pipeline(args)

    from elit.elastic.load import load_network
    from elit.files import check_new_output
    from elit.pretrained import model_name
    from elit.sampling.draw import as_pixels, conditions_of, draw, environment_of, number_of_images, weights_fingerprint
    from elit.sampling.evaluations import sampling_flops
    from elit.sampling.pictures import is_sample, output_kind, save_animation, single_frames, write_samples

    device = check_device(args.device)
    dtype = getattr(torch, args.dtype)
    model, vae = load_network(args.model, vae=args.vae, device=device, dtype=dtype)
    weights, environment = weights_fingerprint(model), environment_of(model.device, compile=args.compile)
    if args.like is not None:
        compare(read_record(args.like), args, weights, environment)

    clips = len(model.sample_size) == 3
    pictures = vae is not None or model.config.in_channels in (1, 3)
    kind = output_kind(args.out, pictures=pictures, clips=clips)  # before the work, not after it
    check_new_output(args.out, overwrite=args.overwrite, folder=kind == "folder", mine=is_sample)
    conditions = conditions_of(model, args.labels, args.prompts, args.text_encoder)
    count = number_of_images(args, conditions)
    plan = planned(args, model, min(count, args.batch_size))
    settings = SampleSettings(**{each.name: getattr(args, each.name) for each in fields(SampleSettings)})
    if plan:
        settings = replace(settings, **planned_settings(plan))
    flops = sampling_flops(model, **settings.arguments())

    if plan:  # what a target is of is not the first run, which prepares kernels and memory
        draw(
            model, replace(settings, count=min(count, settings.batch_size)), conditions=conditions, compile=args.compile
        )
    num_images = count if args.row is None else 1
    start = time.perf_counter()
    with show_progress("sampling", count) as progress:
        x = draw(model, settings, conditions=conditions, row=args.row, compile=args.compile, progress=progress)
    seconds = time.perf_counter() - start
    if not x.isfinite().all():
        raise FloatingPointError("the samples are not finite; give a smaller scale, or another dtype")
    if pictures:
        x = as_pixels(x, vae, settings.batch_size)

    def describe(row: int | None) -> str:
        name = model_name(args.model)
        return SampleRecord(model=name, weights=weights, settings=settings, row=row, made_with=environment).to_text()

    if args.row is None or kind in ("array", "folder"):
        write_samples(
            x, args.out, pictures=pictures, describe=lambda row: describe(row if args.row is None else args.row)
        )
    else:
        save_animation(single_frames(x[0], args.out.suffix), args.out, describe(args.row))
    result = {
        "out": str(args.out),
        "count": num_images,
        "gflops_per_image": flops / 1e9,
        "ms_per_image": 1e3 * seconds / num_images,
        "plan": plan and {"words": plan.words, "ms": plan.ms, "metric": plan.metric, "quality": plan.quality},
    }
    if not args.json:
        what = "clips" if clips else "images"
        print(f"{args.out}: {num_images} {what}, {flops / 1e9:.3f} GFLOPs and {result['ms_per_image']:.1f} ms each")
    return result


def run_pipeline(args: Args) -> dict[str, Any]:
    """Pictures of a stock diffusers pipeline that has a dial, each by a call of its own."""
    import time

    import torch

    from elit.elastic.stock import StockPipeline, find_stock
    from elit.files import check_new_output
    from elit.sampling.draw import check_row, environment_of, weights_fingerprint
    from elit.sampling.pictures import from_pictures, is_sample, output_kind, write_samples

    for name in (*TARGETS, "vae"):
        if getattr(args, name) is not None:
            raise ValueError(f"{name}={getattr(args, name)}: goes with a network of this library, not with a pipeline")
    kind = output_kind(args.out, pictures=True, clips=False)
    check_new_output(args.out, overwrite=args.overwrite, folder=kind == "folder", mine=is_sample)
    device = torch.device(check_device(args.device))
    stock = find_stock(args.model)
    assert stock is not None
    pipe = StockPipeline.load(stock, device=device, dtype=getattr(torch, args.dtype))
    if args.compile:
        pipe.transformer.compile()
    weights, environment = weights_fingerprint(pipe.transformer), environment_of(device, compile=args.compile)
    if args.like is not None:
        compare(read_record(args.like), args, weights, environment)
    settings = SampleSettings(**{each.name: getattr(args, each.name) for each in fields(SampleSettings)})
    conditions = pipe.conditions(settings)
    count = settings.count or len(conditions)
    if args.row is not None:
        check_row(args.row, count)
    rows = range(count) if args.row is None else [args.row]
    gflops = pipe.gflops(settings)
    start = time.perf_counter()
    with show_progress("sampling", len(rows) * settings.steps) as progress:

        def show(place: int, done: int, total: int) -> None:
            if progress:
                progress(place * settings.steps + done * settings.steps // total, len(rows) * settings.steps)

        pictures = [pipe.picture(settings, row, partial(show, place)) for place, row in enumerate(rows)]
    seconds = time.perf_counter() - start

    def describe(row: int | None) -> str:
        record = SampleRecord(model=str(args.model), weights=weights, settings=settings, row=row, made_with=environment)
        return record.to_text()

    def of_row(row: int | None) -> str:
        return describe(row if args.row is None else args.row)

    write_samples(from_pictures(pictures), args.out, pictures=True, describe=of_row)
    result = {"out": str(args.out), "count": len(rows), "gflops_per_image": gflops, "plan": None}
    result["ms_per_image"] = 1e3 * seconds / len(rows)
    if not args.json:
        print(f"{args.out}: {len(rows)} images, {gflops:.3f} GFLOPs and {result['ms_per_image']:.1f} ms each")
    return result


def compare(record: SampleRecord, args: Args, weights: str, environment: dict[str, str]) -> None:
    """Notes why the picture may come out otherwise. Raises ValueError for other weights under the same name."""
    from elit.pretrained import model_name

    if record.weights != weights and record.model == model_name(args.model) and record.settings.dtype == args.dtype:
        raise ValueError(
            f"like={str(args.like)!r}: was made by other weights than {record.model} has now; name the model that made "
            "it, or leave --like out"
        )
    for name, value in environment.items():
        if (before := record.made_with.get(name)) != value:
            print(f"elit sample: note: {args.like} was made with {name} {before}, here it is {value}", file=sys.stderr)


def planned_settings(plan: Any) -> dict[str, Any]:
    """A plan as the options that it stands for."""
    settings: dict[str, Any] = {"steps": plan.steps, "cache": plan.cache, "guidance": "none"}
    settings["budget"] = "full" if plan.budget is None else str(plan.budget)
    if plan.guidance is not None:
        guide = plan.guidance
        settings |= {"guidance": guide.kind, "scale": guide.scale, "guidance_interval": guide.interval}
        if guide.budget is not None:
            settings["guidance_budget"] = str(guide.budget)
    return settings


def planned(args: Args, model: Any, batch: int) -> Any:
    """The plan for the target, if there is one; measures this machine where nobody has."""
    targets = {name: getattr(args, name) for name in TARGETS}
    if not any(value is not None for value in targets.values()):
        return None

    from elit.cli.profile import measured
    from elit.planner.choose import find_profile, network_folder, plan
    from elit.planner.plan import make_target

    make_target(**targets, batch=batch)  # before anything is measured for it
    folder = network_folder(args.model)
    profile = find_profile(model, folder, compile=args.compile)
    if profile is None and targets["target_gflops"] is None:
        check_possible(model, make_target(**targets, batch=batch), batch, compile=args.compile)
        print("elit sample: note: no profile of this machine yet; measuring for half a minute", file=sys.stderr)
        sizes = sorted({1, batch, *(size for size in (2, 4, 8) if size < batch)})
        profile = measured(model, batch_sizes=sizes, seconds=30.0, compile=args.compile)
        try:
            profile.save(folder)
        except OSError as error:
            where = f"{error.strerror}: {str(error.filename)!r}"
            print(f"elit sample: note: the profile cannot be kept ({where})", file=sys.stderr)
    best = plan(model, batch=batch, profile=profile, cache=args.cache or None, compile=args.compile, **targets)
    if not args.json:
        print(best)
    return best


def check_possible(model: Any, target: Any, batch: int, *, compile: bool) -> None:
    """Raises ValueError, before a profile is measured, for a time that not even the cheapest run keeps to."""
    from elit.planner.profile import time_runs
    from elit.sampling.settings import Sampling

    least = Sampling(steps=1, budget=model.budgets[0] if model.budgets else None)
    (ms,), _ = time_runs(model, [(least, batch)], compile=compile, seconds=0.0)
    if ms > target.ms:
        raise ValueError(
            f"{target.text}: the least possible here is {ms:.4g} ms for {batch} image{'s' if batch > 1 else ''}, one "
            "step with the fewest latents and no guidance"
        )


def guidance_from(args: Any) -> Any:
    """elit.CFG, AG or CCFG from the options of that name, or None."""
    return make_guidance(args.guidance, args.scale, args.guidance_budget, args.guidance_interval)


def conditions_from(args: Any, model: Any, device: str) -> Any:
    """y of every label or prompt. Raises ValueError where the model takes the other kind."""
    from elit.sampling.draw import conditions_of

    return conditions_of(model, args.labels, args.prompts, args.text_encoder)
