"""elit import"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from elit.cli.main import Output
from elit.config import require_counts
from elit.files import Json, check_new_output
from elit.models.saved import save_model
from elit.released.load import LICENCE, load_released


@dataclass(frozen=True, kw_only=True)
class Args(Output):
    """Convert a published checkpoint (ELIT-SiT, SiT or DiT, a .pt file) into a saved model. No code in it is run. The
    weights keep their own licence.

    Example: elit import elit_sit_mb_imagenet_256px_1k_2000000.pt runs/released
    """

    file: Annotated[Path, tyro.conf.Positional]  # The published .pt file.
    out: Annotated[Path, tyro.conf.Positional]  # New folder for config.json and safetensors.
    kind: Literal["elit", "sit", "dit"] | None = None  # Format: ELIT's, SiT's or DiT's; only bare weights need it.
    num_heads: int | None = None  # Attention heads; default: those of S, B, L or XL by width.
    tail_blocks: int | None = None  # Blocks after Write; default: those of S, B, L or XL.
    weights: Literal["ema", "model"] = "ema"  # The averaged weights, or those of the last step.

    def __post_init__(self) -> None:
        require_counts(self, "num_heads", "tail_blocks")


def run(args: Args) -> Json:
    check_new_output(args.out, overwrite=args.overwrite, folder=True)
    if args.out.is_dir() and any(args.out.iterdir()) and not (args.out / "config.json").is_file():
        raise ValueError(f"cannot write out={str(args.out)!r}: it holds no saved model; give a new folder")
    sizes: Json = {"num_heads": args.num_heads, "tail_blocks": args.tail_blocks}
    model = load_released(args.file, kind=args.kind, ema=args.weights == "ema", **sizes)
    save_model(model, args.out)
    if not args.json:
        kind = f"ELIT-SiT, budgets {model.budgets[0]} to {model.budgets[-1]}" if model.budgets else "SiT, no budgets"
        size = "×".join(map(str, model.sample_size))
        print(f"{args.out}: {kind}, {model.num_parameters() / 1e6:.1f}M parameters, samples of {size} cells")
    print(f"note: {LICENCE}")
    sizes = {"parameters": model.num_parameters(), "budgets": list(model.budgets)}
    return {"out": str(args.out), **sizes, "sample_size": list(model.sample_size), "licence": LICENCE}
