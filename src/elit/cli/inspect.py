"""elit inspect"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from elit.cli.main import Output, check_device, show_progress
from elit.cli.options import GuidanceArgs, OfNetwork
from elit.config import require, require_counts
from elit.elastic.load import load_network
from elit.evaluate.inspect.attention import TIMES, interface_of
from elit.evaluate.inspect.inspection import PICTURES, inspect_model, load_probe, tables
from elit.evaluate.tables import print_table
from elit.files import Json, check_new_output, write_folder
from elit.sampling.settings import STEPS, Sampling


@dataclass(frozen=True, kw_only=True)
class Args(GuidanceArgs, OfNetwork, Output):
    """Inspect an ELIT model: Read's attention beside the flow-matching loss and their rank correlation, the attention
    of first and last latents, and loss and samples at every budget. Takes minutes on a CPU; with --count 8 --draws 2
    a sixteenth of them.

    Example: elit inspect runs/quickstart/model --data digits --out runs/inside
    """

    model: Annotated[Path, tyro.conf.Positional]  # Folder of a saved model or pipeline.
    data: str = "samples"
    """Data to measure with: samples (the model's own, of all classes), digits, moving-digits, fashion-mnist,
    idx:FOLDER, a folder of images (one sub-folder a class, or with a metadata.jsonl of captions), or one that elit
    encode wrote."""
    out: Path = Path("runs/inspect")  # Folder for inspect.json and the pictures.
    count: int = 32  # Samples of the data, evenly spaced over it.
    vae: Path | None = None  # Folder of the autoencoder that the model was trained in; default: the pipeline's.
    image_size: int | None = None  # A folder's images are cut to this; default: the model's size.
    times: tuple[float, ...] = TIMES  # Times of the measurements; 0 = noise, 1 = data.
    draws: int = 4  # Draws of noise a sample.
    steps: int = STEPS  # Solver steps of the samples at every budget.
    seed: int = 0  # Seed of all noise.
    batch_size: int = 64  # Noisy samples in one forward.

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "draws", "steps", "batch_size", "image_size")
        require_counts(self, "count", least=2)
        valid = bool(self.times) and all(0 <= time <= 1 for time in self.times)
        require(valid, "times", self.times, "at least one in [0, 1], 0 = noise, 1 = data")


def run(args: Args) -> Json:
    check_new_output(args.out, overwrite=args.overwrite, folder=True, mine=(*PICTURES, "inspect.json").__contains__)
    device, dtype = check_device(args.device), getattr(torch, args.dtype)
    model, vae = load_network(args.model, vae=args.vae, device=device, dtype=dtype)
    interface_of(model)
    settings = {name: getattr(args, name) for name in ("image_size", "seed", "times", "draws", "batch_size")}
    probe = load_probe(model, args.data, args.count, vae=vae, **settings)
    sampling = Sampling(steps=args.steps, guidance=args.make_guidance(), seed=args.seed)
    numbers: Json = {}
    with show_progress("inspecting", 1) as progress:
        options: Json = {"vae": vae, "progress": progress}
        write_folder(args.out, lambda folder: numbers.update(inspect_model(model, probe, sampling, folder, **options)))
    if not args.json:
        for title, headings, rows in tables(numbers):
            print_table(headings, rows, title=title)
        print(f"Pictures: {args.out}")
    return numbers
