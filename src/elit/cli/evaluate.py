"""elit evaluate"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from elit.cli.checks import check_arguments, check_output
from elit.cli.main import check_device, show_notes, show_progress
from elit.cli.main import parse as parse_arguments
from elit.cli.sample import conditions_from, guidance_from
from elit.data.builtin import is_named
from elit.files import check_new_output, leaving_nothing
from elit.pretrained import model_folder

FIELD_COUNT = 50_000  # samples behind published figures


@dataclass(frozen=True, kw_only=True)
class Args:
    """Score a model's samples, or pictures from a folder or an .npz, against reference statistics. What a killed run
    has made is kept: run it again. Several processes share the work under accelerate launch or torchrun.

    Example: elit evaluate runs/quickstart/model --reference digits --detector digits --count 200 --steps 16
    """

    pictures: Annotated[Path, tyro.conf.Positional]
    """Folder of a saved model or pipeline; or a folder of images, a .npz (arr_0), .parquet, .tar or saved dataset."""
    reference: Path | None = None
    """Real pictures (as above, or digits, moving-digits), statistics saved with --save-reference, or ADM's .npz."""
    detector: tuple[str, ...] = ("inception",)
    """One or more of: inception[:WEIGHTS.pth] (FID), dinov2[:NAME or FOLDER] (FDD), classifier:NAME-or-FOLDER
    (accuracy), i3d:FILE.pt (FVD), digits, moving-digits."""
    metrics: tuple[str, ...] = ()
    """Of fid sfid fdd fvd fd is kid precision recall accuracy steady; default: what each detector is used for."""
    count: int | None = None
    """Samples to score; default: 50,000 of a model, all of given pictures."""
    out: Path = Path("runs/evaluate")
    """Folder for sample sets, references and scores; or a .npz for the samples as the ADM evaluator reads them, with
    that folder beside it, of the same name without .npz."""
    save_reference: Path | None = None
    """Save the statistics of the pictures as this .safetensors, to be given as --reference; scores nothing."""
    image_size: int | None = None
    """Cut the reference's pictures as ADM does (and the scored ones, if files); default: they are of one size."""
    labels: tuple[str, ...] = ()
    """Classes, by number or name of a model's samples, in turn; default: all of the model's."""
    prompts: tuple[str, ...] = ()
    """Texts, in turn, for a text-conditional model; accuracy takes the first for class 0, the second for class 1 and
    so on."""
    prompts_file: Path | None = None
    """A file with one text a line instead."""
    text_encoder: str | None = None
    """Hugging Face name or folder of the encoder that a text-conditional model was trained with; default: as saved."""
    budget: str = "full"
    """Latents per group (8; 1 is one latent), a share of them (50%), all (100%), or a schedule over t
    (50%@0-0.5,100%@0.5-1)."""
    guidance: Literal["none", "cfg", "ag", "ccfg"] = "none"
    """cfg drops the class in the second branch, ag lowers its budget, ccfg does both."""
    scale: float = 1.5
    """Guidance scale; 1 is off."""
    guidance_budget: str = "1"
    """Budget of the second branch of ag and ccfg: latents per group (1) or a share of them (25%)."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times between which guidance acts; 0 = noise, 1 = data."""
    steps: int = 40
    """Solver steps."""
    solver: Literal["euler", "heun"] = "euler"
    """heun is second order and evaluates twice a step."""
    shift: float = 1.0
    """More of the steps near noise; 1 is even."""
    cache: float = 0.0
    """Step caching: a step reuses the last output while the time embedding has moved by less, relatively; 0 is off."""
    seed: int = 0
    """Seed of the first sample; the next ones count up."""
    vae: Path | None = None
    """Folder of the autoencoder that the model was trained in; default: the pipeline's, if it is one."""
    chunk: int = 32
    """Samples computed at once, by network, autoencoder and detector. Decides roundings, so part of the recipe."""
    batch_size: int = 256
    """Samples between two files, in whole chunks; changes no sample and no score."""
    device: str | None = None
    """Such as cuda or cpu; default: cuda where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the network; the solver's state and the detectors stay float32."""
    compile: bool = False
    """torch.compile on the network: worth it from some hundred samples on. Part of the recipe."""
    overwrite: bool = False
    """Replace the .npz or .safetensors that is there, once the new is whole. Scores and sample sets are never replaced:
    other settings go into other files of the folder."""
    json: bool = False
    """Print the scores as JSON last on stdout."""


def parse(arguments: Sequence[str]) -> Args:
    args: Args = parse_arguments(Args, "evaluate", arguments)
    check_arguments(args, count=2)
    _check(args)
    check_output(work_folder(args))
    return args


def run(args: Args) -> dict[str, Any] | None:
    with show_notes("evaluate"), leaving_nothing(work_folder(args)):
        return _run(args)


def _run(args: Args) -> dict[str, Any] | None:
    from accelerate import PartialState

    from elit.evaluate.chunks import Share
    from elit.evaluate.pictures import First, open_pictures
    from elit.evaluate.score import score

    if args.save_reference is not None:
        check_new_output(args.save_reference, overwrite=args.overwrite, folder=False, name="save_reference")
    elif args.out.suffix == ".npz":
        check_new_output(args.out, overwrite=args.overwrite, folder=False)
    state = PartialState(cpu=check_device(args.device) == "cpu")
    share = Share(state.process_index, state.num_processes, state.wait_for_everyone)
    device = args.device or str(state.device)
    work = work_folder(args)
    options: dict[str, Any] = {"chunk": args.chunk, "batch_size": args.batch_size, "share": share}

    # What is quick to refuse, then detectors and references, then sampling, which takes longest.
    if is_model(args.pictures):
        sampler, setting = _sampler(args, device, work)
        groups = open_metrics(args, device, work, share)
        pictures = _draw(args, sampler, setting, share)
    else:
        given = open_pictures(args.pictures, args.image_size)
        groups = open_metrics(args, device, work, share)
        pictures = given if args.count is None else First(given, args.count)
    if args.save_reference is not None:
        return _save_reference(args, pictures, groups[0].detector, work, options)

    results: dict[str, Any] = {}
    for group in groups:
        with show_progress(group.detector.name, len(pictures)) as progress:
            options_of_group: dict[str, Any] = {"metrics": group.metrics, "progress": progress}
            results[group.specification] = score(
                pictures, group.detector, group.reference, out=work, **options_of_group, **options
            )
    if not share.main:
        return None
    if args.out.suffix == ".npz":
        from elit.evaluate.pictures import write_npz

        write_npz(pictures, args.out)
    return _report(args, pictures, results)


def work_folder(args: Args) -> Path:
    """Where sample sets, references and scores go."""
    return args.out.with_suffix("") if args.out.suffix == ".npz" else args.out


def check_detectors(args: Any) -> None:
    """Whether there is a detector at all, and none twice. Raises ValueError."""
    if not args.detector:
        raise ValueError("detector: give at least one")
    if len(set(args.detector)) < len(args.detector):
        raise ValueError(f"detector={' '.join(args.detector)!r}: one of them stands twice")


def _check(args: Args) -> None:
    """What can be said before anything is loaded. Raises ValueError."""
    check_detectors(args)
    if not is_named(str(args.pictures)) and not model_folder(args.pictures).exists():
        raise ValueError(f"pictures={str(args.pictures)!r}: no such file or folder")
    if args.prompts_file is not None and not args.prompts_file.is_file():
        raise ValueError(f"prompts_file={str(args.prompts_file)!r}: no such file")
    if args.save_reference is not None:
        if args.save_reference.suffix != ".safetensors":
            raise ValueError(f"save_reference={str(args.save_reference)!r}: give a name that ends in .safetensors")
        if len(args.detector) != 1:
            raise ValueError("save_reference: a reference is of one detector; give one")


def open_metrics(args: Any, device: str, work: Path, share: Any) -> list[Any]:
    """The detectors of the options of that name, with their references and the metrics asked of each.

    Raises ValueError for what cannot be had.
    """
    from elit.evaluate.detectors import open_detector
    from elit.evaluate.reference import open_reference
    from elit.evaluate.score import MetricGroup

    detectors = [open_detector(specification, device=device) for specification in args.detector]
    wanted = _metrics_of(detectors, args.metrics)
    options: dict[str, Any] = {"out": work, "image_size": args.image_size, "share": share}
    options |= {"chunk": args.chunk, "batch_size": args.batch_size}
    groups = []
    for specification, detector in zip(args.detector, detectors, strict=True):
        reference = None
        if args.reference is not None:
            with show_progress("reference", 1) as progress:
                reference = open_reference(args.reference, detector, progress=progress, **options)
        groups.append(MetricGroup(specification, detector, reference, wanted[detector.name]))
    return groups


def _metrics_of(detectors: Sequence[Any], metrics: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The metrics asked for, by the detector that offers them. Raises ValueError for one that none does."""
    for name in metrics:
        if not any(name in detector.offers for detector in detectors):
            here = "; ".join(f"{detector.name} offers {', '.join(detector.offers)}" for detector in detectors)
            raise ValueError(f"metrics={name!r}: {here}")
    by_detector = {detector.name: tuple(name for name in metrics if name in detector.offers) for detector in detectors}
    if metrics and (idle := [name for name, names in by_detector.items() if not names]):
        raise ValueError(f"detector={idle[0]!r}: offers none of the metrics {', '.join(metrics)}")
    return by_detector


def is_model(folder: Path) -> bool:
    """Whether a saved model or pipeline lies there, and no pictures."""
    return any((folder / name).is_file() for name in ("config.json", "model_index.json"))


def _sampler(args: Args, device: str, work: Path) -> tuple[Any, Any]:
    """What draws the model's samples, and how. Raises ValueError for a setting that does not fit the model."""
    from elit.evaluate.samples import Setting

    sampler = open_sampler(args, args.pictures, device, work)
    same = {name: getattr(args, name) for name in ("steps", "budget", "solver", "shift", "cache", "seed")}
    setting = Setting(guidance=guidance_from(args), **same)
    sampler.recipe(setting)
    return sampler, setting


def _draw(args: Args, sampler: Any, setting: Any, share: Any) -> Any:
    """A model's samples, made now."""
    count = args.count or FIELD_COUNT
    with show_progress("sampling", count) as progress:
        return sampler.draw(setting, count, batch_size=args.batch_size, share=share, progress=progress)


def open_sampler(args: Any, folder: Path, device: str, work: Path) -> Any:
    """The model in `folder` with the autoencoder and the conditions of the options of that name."""
    import torch

    from elit.elastic.load import load_network
    from elit.evaluate.samples import Sampler

    dtype = getattr(torch, args.dtype)
    model, vae = load_network(folder, vae=args.vae, device=device, dtype=dtype)
    if args.prompts_file is not None:
        if not args.prompts_file.is_file():
            raise ValueError(f"prompts_file={str(args.prompts_file)!r}: no such file")
        args = replace(args, prompts=tuple(args.prompts_file.read_text(encoding="utf-8").splitlines()))
    conditions = conditions_from(args, model, device)
    return Sampler(model, work, vae=vae, conditions=conditions, chunk=args.chunk, compile=args.compile)


def _save_reference(
    args: Args, pictures: Any, detector: Any, work: Path, options: dict[str, Any]
) -> dict[str, Any] | None:
    from elit.evaluate.detection import detect
    from elit.evaluate.reference import reference_from, save_reference

    with show_progress(detector.name, len(pictures)) as progress:
        detections = detect(pictures, detector, work, progress=progress, **options)
    if not options["share"].main:
        return None
    reference = reference_from(detections, pictures, detector)
    assert args.save_reference is not None
    save_reference(reference, args.save_reference)
    if not args.json:
        print(f"{args.save_reference}: {detector.name}'s statistics of {detections.count} pictures")
    return {"reference": str(args.save_reference), "count": detections.count, "made": reference.origin}


def _report(args: Args, pictures: Any, results: dict[str, Any]) -> dict[str, Any]:
    """Prints a line a detector; returns what --json prints."""
    first = next(iter(results.values()))
    if not args.json:
        for name, result in results.items():
            figures = "  ".join(f"{metric} {value:.4f}" for metric, value in result.scores.items())
            print(f"{name}, {len(pictures)} samples: {figures}  ({result.path})")
        if first.gflops is not None:
            print(f"{first.gflops:.3f} GFLOPs and {first.ms:.1f} ms a sample")
    return {
        "count": len(pictures),
        "set_sha256": first.set_sha256,
        "scores": {name: result.scores for name, result in results.items()},
        "notes": list(dict.fromkeys(note for result in results.values() for note in result.notes)),
        "gflops_per_sample": first.gflops,
        "ms_per_sample": first.ms,
        "files": {name: str(result.path) for name, result in results.items()},
    }
