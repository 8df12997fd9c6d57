"""elit inspect"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from elit.cli.checks import check_arguments, check_output
from elit.cli.main import check_device, show_progress
from elit.cli.main import parse as parse_arguments
from elit.cli.sample import guidance_from


@dataclass(frozen=True, kw_only=True)
class Args:
    """Look inside an ELIT model: Read attention beside the flow-matching loss and their rank correlation, what first
    and last latents read, the same noise at every budget, and which latents matter. Takes minutes on a CPU; with
    --count 8 --draws 2 a sixteenth of them.

    Example: elit inspect runs/quickstart/model --data digits --out runs/inside
    """

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a saved model or pipeline."""
    data: str = "samples"
    """What to look at: samples (the model's own, of all classes), digits, moving-digits, fashion-mnist, idx:FOLDER, a
    folder of images (one sub-folder a class, or with a metadata.jsonl of captions), or one that elit encode wrote."""
    out: Path = Path("runs/inspect")
    """Folder for report.html, inspect.json and the pictures."""
    overwrite: bool = False
    """Replace what is there, once the new is whole."""
    count: int = 32
    """Samples to look at, evenly spaced over the data."""
    vae: Path | None = None
    """Folder of the autoencoder that the model was trained in; default: the pipeline's, if it is one."""
    image_size: int | None = None
    """A folder's images are cut to this; default: what the model takes."""
    times: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Times to look at; 0 = noise, 1 = data."""
    draws: int = 4
    """Draws of noise through which each sample is seen."""
    steps: int = 16
    """Solver steps of the samples at every budget."""
    guidance: Literal["none", "cfg", "ag", "ccfg"] = "none"
    """Of those samples: cfg drops the class in the second branch, ag lowers its budget, ccfg does both."""
    scale: float = 1.5
    """Guidance scale; 1 is off."""
    guidance_budget: str = "1"
    """Budget of the second branch of ag and ccfg."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times between which guidance acts."""
    seed: int = 0
    """Seed of all noise."""
    batch_size: int = 64
    """Noisy samples in one forward."""
    device: str | None = None
    """Such as cuda or cpu; default: cuda where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the network; losses are float32."""
    json: bool = False
    """Print inspect.json's content last on stdout."""


def parse(arguments: Sequence[str]) -> Args:
    args: Args = parse_arguments(Args, "inspect", arguments)
    check_arguments(args, count=2)
    check_output(args.out)
    return args


def run(args: Args) -> dict[str, Any]:
    import torch

    from elit.elastic.load import load_network
    from elit.evaluate.inspect.attention import interface_of
    from elit.evaluate.inspect.examples import load_examples
    from elit.evaluate.inspect.inspection import inspect_model
    from elit.evaluate.inspect.page import is_inspection, write_inside
    from elit.evaluate.inspect.probe import Probe
    from elit.files import check_new_output, write_folder
    from elit.sampling.settings import Sampling

    device, dtype = check_device(args.device), getattr(torch, args.dtype)
    check_new_output(args.out, overwrite=args.overwrite, folder=True, mine=is_inspection)
    model, vae = load_network(args.model, vae=args.vae, device=device, dtype=dtype)
    interface_of(model)
    wanted: dict[str, Any] = {"vae": vae, "image_size": args.image_size, "seed": args.seed}
    examples = load_examples(model, args.data, args.count, **wanted)
    settings = {name: getattr(args, name) for name in ("times", "draws", "seed", "batch_size")}
    probe = Probe(x=examples.x, y=examples.y, **settings)
    setting = Sampling(steps=args.steps, guidance=guidance_from(args), seed=args.seed)
    with show_progress("looking", 1) as progress:
        inspection = inspect_model(model, examples, probe, setting, vae=vae, progress=progress)
    write_folder(args.out, lambda folder: write_inside(inspection, folder, str(args.model)))
    report = args.out / "report.html"
    if not args.json:
        _print(inspection.numbers)
        print(f"Report: {report}")
    return inspection.numbers


def _print(numbers: dict[str, Any]) -> None:
    """The rank correlation at every time, and the loss without each latent."""
    from elit.evaluate.inspect.page import CORRELATION, WITHOUT, correlation_cells, without_cells
    from elit.evaluate.report.tables import print_table

    title = "Rank correlation of Read attention and loss"
    print_table(CORRELATION, [correlation_cells(row) for row in numbers["attention_and_loss"]], title=title)
    print_table(WITHOUT, [without_cells(row) for row in numbers["without"]], title="Loss with a latent dropped")
