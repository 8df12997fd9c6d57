"""elit import"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from elit.cli.checks import check_arguments, check_output
from elit.cli.main import parse as parse_arguments


@dataclass(frozen=True, kw_only=True)
class Args:
    """Turn a published checkpoint (ELIT-SiT, SiT or DiT, a .pt file) into a saved model. Nothing in it is run. The
    weights keep their own licence.

    Example: elit import elit_sit_mb_imagenet_256px_1k_2000000.pt runs/released
    """

    file: Annotated[Path, tyro.conf.Positional]
    """The published .pt file."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder for config.json and safetensors; it is the model's alone."""
    overwrite: bool = False
    """Replace what is there, once the new is whole."""
    kind: Literal["elit", "sit", "dit"] | None = None
    """Whose format: ELIT's authors', the original SiT's or the original DiT's; needed for bare weights alone."""
    num_heads: int | None = None
    """Attention heads; default: those of S, B, L or XL by width."""
    tail_blocks: int | None = None
    """Blocks after Write; default: those of S, B, L or XL."""
    weights: Literal["ema", "model"] = "ema"
    """The averaged weights, or those of the last step."""
    json: bool = False
    """Print what was imported as JSON last on stdout."""


def parse(arguments: Sequence[str]) -> Args:
    args: Args = parse_arguments(Args, "import", arguments)
    check_arguments(args)
    check_output(args.out)
    return args


def run(args: Args) -> dict[str, Any]:
    from elit.files import check_new_output
    from elit.models.saved import save_model
    from elit.released import LICENCE
    from elit.released.load import load_released

    check_new_output(args.out, overwrite=args.overwrite, folder=True)
    if args.out.exists() and not (args.out / "config.json").is_file() and not _empty(args.out):
        raise ValueError(f"out={str(args.out)!r}: is there, and no saved model; give a new folder")
    sizes = {"num_heads": args.num_heads, "tail_blocks": args.tail_blocks}
    model = load_released(args.file, kind=args.kind, ema=args.weights == "ema", **sizes)
    save_model(model, args.out)
    result = {
        "out": str(args.out),
        "parameters": model.num_parameters(),
        "budgets": list(model.budgets),
        "sample_size": list(model.sample_size),
        "licence": LICENCE,
    }
    if not args.json:
        what = f"ELIT-SiT, budgets {model.budgets[0]} to {model.budgets[-1]}" if model.budgets else "SiT, no budgets"
        size = "×".join(map(str, model.sample_size))
        print(f"{args.out}: {what}, {result['parameters'] / 1e6:.1f}M parameters, samples of {size} cells")
    print(f"note: {LICENCE}")
    return result


def _empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())
