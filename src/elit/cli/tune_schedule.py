"""elit tune-schedule"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from elit.cli.checks import check_arguments
from elit.cli.main import check_device, show_progress
from elit.cli.main import parse as parse_arguments


@dataclass(frozen=True, kw_only=True)
class Args:
    """Find the budgets over t with the least loss at a given mean cost, by the model's own loss; no images are made.
    Half of the samples are searched with, the other half say what was gained over a constant budget.

    Example: elit tune-schedule runs/quickstart/model --data digits --mean-share 0.5
    """

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a saved model or pipeline."""
    data: str
    """What the loss is of: digits, moving-digits, a folder of images (one sub-folder a class, or with a metadata.jsonl
    of captions), or a folder that elit encode wrote."""
    mean_share: float | None = None
    """Bound of the mean cost, as a share of the latents; this or mean-gflops."""
    mean_gflops: float | None = None
    """Bound of the mean cost of an evaluation of one sample, in GFLOPs."""
    bins: int = 8
    """Equal parts of the way from noise to data, each with a budget of its own."""
    count: int = 256
    """Samples, evenly spaced over the data."""
    draws: int = 4
    """Draws of noise through which each sample is seen."""
    vae: Path | None = None
    """Folder of the autoencoder that the model was trained in; default: the pipeline's, if it is one."""
    image_size: int | None = None
    """A folder's images are cut to this; default: what the model takes."""
    out: Path | None = None
    """A .json file for everything that was found; default: none."""
    overwrite: bool = False
    """Replace what is there, once the new is whole."""
    seed: int = 0
    """Seed of all noise."""
    batch_size: int = 64
    """Noisy samples in one forward."""
    device: str | None = None
    """Such as cuda or cpu; default: cuda where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the network; losses are float32."""
    json: bool = False
    """Print what was found as JSON last on stdout."""


def parse(arguments: Sequence[str]) -> Args:
    args: Args = parse_arguments(Args, "tune-schedule", arguments)
    check_arguments(args, count=2)
    return args


def run(args: Args) -> dict[str, Any]:
    import json
    from dataclasses import asdict

    import torch

    from elit.elastic.load_model import load_network
    from elit.evaluate.inspect.examples import load_examples
    from elit.files import check_new_output, write_text
    from elit.planner.tune import make_probe, tune_schedule

    device, dtype = check_device(args.device), getattr(torch, args.dtype)
    if args.out is not None and args.out.suffix != ".json":
        raise ValueError(f"out={str(args.out)!r}: give a name that ends in .json")
    if args.out is not None:
        check_new_output(args.out, overwrite=args.overwrite, folder=False)
    model, vae = load_network(args.model, vae=args.vae, device=device, dtype=dtype)
    examples = load_examples(model, args.data, args.count, vae=vae, image_size=args.image_size, seed=args.seed)
    sizes: dict[str, Any] = {name: getattr(args, name) for name in ("bins", "draws", "seed", "batch_size")}
    total = make_probe(examples.x, examples.y, **sizes).forwards * len(model.budgets)
    done = 0
    with show_progress("losses", total) as progress:

        def tick() -> None:
            nonlocal done
            done += 1
            if progress:
                progress(done, total)

        sizes |= {"mean_share": args.mean_share, "mean_gflops": args.mean_gflops}
        tuned = tune_schedule(model, examples.x, examples.y, tick=tick, **sizes)
    result = {**asdict(tuned), "gain": tuned.gain, "model": str(args.model), "data": args.data, "count": args.count}
    if args.out is not None:
        write_text(args.out, json.dumps(result, indent=1) + "\n")
    if not args.json:
        _print(tuned, len(model.budgets) and model.budgets[-1])
        if args.out is not None:
            print(f"Result: {args.out}")
    return result


def _print(tuned: Any, most: int) -> None:
    print(f"schedule: {tuned.schedule}")
    print(f"  {tuned.share:.1%} of the latents on average, {tuned.gflops:.4g} GFLOPs an evaluation")
    print(f"  loss {tuned.loss:.6f}; all {most} latents {tuned.full_loss:.6f}")
    print(f"  constant budgets: {tuned.interpolated_loss:.6f} at the same cost, between two counts;")
    print(f"  {tuned.constant_loss:.6f} with {tuned.constant}, the most that keep to the bound")
    above = tuned.interpolated_loss - tuned.full_loss
    share = f", {tuned.gain / above:.0%} of what they lose against all latents" if above > 0 else ""
    print(f"  gain over constant budgets of the same cost: {tuned.gain:.6f}{share}")
    print(f'use it: elit sample MODEL --budget "{tuned.schedule}"')
