"""elit profile"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from elit.cli.main import check_device, show_progress
from elit.cli.options import OfNetwork
from elit.config import require_counts
from elit.elastic.load import load_model
from elit.files import Json, check_writable
from elit.models.transformer import Transformer
from elit.planner.choose import network_folder
from elit.planner.profile import Profile, measure_profile, profile_path, profile_recipe


@dataclass(frozen=True, kw_only=True)
class Args(OfNetwork):
    """Measure what sampling a model takes on this machine, over budgets, batch sizes and guidances, and fit a cost
    model that predicts all other settings. The profile lies in the model's folder; elit.plan and elit sample
    --target-ms find it there. It holds for the dtype and compile that it was measured with.

    Example: elit profile runs/quickstart/model
    """

    model: Annotated[Path, tyro.conf.Positional]  # Folder of a saved model or pipeline.
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)  # Images at a time; plans hold for others between them too.
    compile: bool = False  # Compile the network.
    seconds: float = 60.0  # How long to measure; at least three rounds, however long they take.

    def __post_init__(self) -> None:
        require_counts(self, "batch_sizes")


def run(args: Args) -> Json:
    model = load_model(args.model, torch_dtype=getattr(torch, args.dtype)).to(check_device(args.device)).eval()
    folder = network_folder(args.model) or args.model
    path = profile_path(folder, profile_recipe(model, compile=args.compile))
    check_writable(path, "model")
    profile = measured(model, batch_sizes=args.batch_sizes, seconds=args.seconds, compile=args.compile)
    profile.save(folder)
    if not args.json:
        fitted, unseen = (profile.error(held_out=which) for which in (False, True))
        print(f"Mean error: {fitted:.1%} of the runs fitted, {unseen:.1%} held out.")
        print(f"Profile: {path}")
    return {"path": str(path), "error": profile.error(held_out=True), **asdict(profile)}


def measured(model: Transformer, *, seconds: float, **options: Any) -> Profile:
    with show_progress("measuring", round(seconds)) as progress:
        return measure_profile(model, seconds=seconds, progress=progress, **options)
