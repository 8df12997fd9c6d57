"""elit evaluate"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from accelerate import PartialState

from elit.cli.main import Output, check_device, show_progress
from elit.cli.options import SamplingArgs
from elit.config import WAIT, check_data, require, require_counts
from elit.evaluate.chunks import Work
from elit.evaluate.pictures import Pictures, open_pictures, write_npz
from elit.evaluate.reference import measure_reference, save_reference
from elit.evaluate.score import FIELD_COUNT, MetricGroup, Result, Scoring, score, score_path
from elit.files import Json, check_new_output, check_writable, leaving_nothing


@dataclass(frozen=True, kw_only=True)
class Args(SamplingArgs, Scoring, Output):
    """Score a model's samples, or pictures from a folder or an .npz, against reference statistics. The work of a killed
    run is kept: run it again. Several processes share the work under accelerate launch or torchrun.

    Example: elit evaluate runs/quickstart/model --reference digits --detector digits --count 200 --steps 16
    """

    pictures: Annotated[Path, tyro.conf.Positional]  # Saved model or pipeline; image folder, .npz, .parquet or .tar.
    count: int | None = None  # Samples to score; default: 50,000 of a model, all of given pictures.
    out: Path = Path("runs/evaluate")  # Folder for what is kept: samples, references, scores; or a .npz beside one.
    save_reference: Path | None = None  # Save the statistics as this .safetensors, a --reference; scores nothing.

    def __post_init__(self) -> None:
        SamplingArgs.__post_init__(self)
        Scoring.__post_init__(self)
        require_counts(self, "count", least=2)
        if self.save_reference is not None:
            name = str(self.save_reference)
            require(self.save_reference.suffix == ".safetensors", "save_reference", name, "a .safetensors")
            require(len(self.detector) == 1, "detector", " ".join(self.detector), "one alone with --save-reference")

    @property
    def folder(self) -> Path:
        return self.out.with_suffix("") if self.out.suffix == ".npz" else self.out


def run(args: Args) -> Json | None:
    check_data(str(args.pictures), "pictures")
    check_writable(args.folder)
    if args.save_reference is not None:
        check_new_output(args.save_reference, overwrite=args.overwrite, name="save_reference")
    elif args.out.suffix == ".npz":
        check_new_output(args.out, overwrite=args.overwrite)
    with leaving_nothing(args.folder):
        state = PartialState(cpu=check_device(args.device) == "cpu", timeout=WAIT)
        work = args.work(args.folder, state)
        pictures, groups = _open(args, args.device or str(state.device), work)
        if args.save_reference is not None:
            with show_progress(groups[0].detector.name, pictures.count) as progress:
                real = measure_reference(pictures, groups[0].detector, work, progress)
            if real is None:
                return None
            save_reference(real, args.save_reference)
            if not args.json:
                print(f"{args.save_reference}: {groups[0].detector.name}'s statistics of {pictures.count} pictures")
            return {"reference": str(args.save_reference), "count": pictures.count, "made": real.origin}
        results: dict[str, Result] = {}
        for group in groups:
            with show_progress(group.detector.name, pictures.count) as progress:
                result = score(pictures, group, work, progress)
            if result is not None:
                results[group.specification] = result
    if not work.main:
        return None
    if args.out.suffix == ".npz":
        write_npz(pictures, args.out)
    files = {name: str(score_path(result.recipe, args.folder)) for name, result in results.items()}
    first = next(iter(results.values()))
    if not args.json:
        for name, result in results.items():
            figures = "  ".join(f"{metric} {value:.4f}" for metric, value in result.scores.items())
            print(f"{name}, {pictures.count} samples: {figures}  ({files[name]})")
        if first.gflops_per_sample is not None:
            print(f"{first.gflops_per_sample:.3f} GFLOPs and {first.ms_per_sample:.1f} ms a sample")
    shared = {name: getattr(first, name) for name in ("set_sha256", "gflops_per_sample", "ms_per_sample")}
    scores = {name: result.scores for name, result in results.items()}
    notes = list(dict.fromkeys(note for result in results.values() for note in result.notes))
    return {"count": pictures.count, "scores": scores, "notes": notes, "files": files, **shared}


def _open(args: Args, device: str, work: Work) -> tuple[Pictures, list[MetricGroup]]:
    """Cheap refusals first, then detectors and references, then sampling, which takes longest."""
    if not any((args.pictures / name).is_file() for name in ("config.json", "model_index.json")):
        pictures = open_pictures(args.pictures, args.image_size, skip_unreadable=args.skip_unreadable)
        groups, count = args.open_metrics(device, work), args.count or pictures.count
        require(count <= pictures.count, "count", count, f"at most {pictures.count}, the number of pictures")
        return replace(pictures, count=count), groups
    sampler, count = args.open_sampler(args.pictures, device, work), args.count or FIELD_COUNT
    sampler.recipe(args.sampling())
    groups = args.open_metrics(device, work)
    with show_progress("sampling", count) as progress:
        return sampler.make(args.sampling(), count, progress), groups
