"""elit encode"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from accelerate import PartialState

from elit.cli.main import Output, check_device, show_progress
from elit.cli.options import OnDevice
from elit.config import WAIT
from elit.data.encode import Encoding, encode, load_encoder
from elit.data.images import LatentSet, posterior_sample
from elit.data.source import open_source
from elit.files import Json, check_new_output, check_writable
from elit.sampling.autoencoders import decode
from elit.sampling.pictures import as_pictures, image_grid, save_frames


@dataclass(frozen=True, kw_only=True)
class Args(Encoding, OnDevice, Output):
    """Encode images or clips with an autoencoder, once, for training on their latents. What is there already is kept:
    run it again after a kill. Several processes share the work under accelerate launch or torchrun.

    Example: elit encode photos/ latents/ --vae runs/vae --image-size 64
    """

    src: Annotated[Path, tyro.conf.Positional] = Path()
    """A folder of images (one sub-folder a class), of .parquet or webdataset .tar files, or one that datasets saved."""
    out: Annotated[Path, tyro.conf.Positional] = Path()  # Folder for encode.json, shard-….arrow and index.json.
    inspect: Path | None = None  # Instead, decode a few samples of this encoded folder, into inspect.png in it.


def run(args: Args) -> Json | None:
    if args.inspect is not None:
        check_new_output(args.inspect / "inspect.png", overwrite=args.overwrite, name="inspect")
        return _inspect(args, args.inspect)
    if missing := next((name for name in ("src", "out", "vae") if str(getattr(args, name)) in ("", ".")), None):
        raise ValueError(f"{missing} must be given: elit encode SRC OUT --vae NAME")
    check_writable(args.out)
    state = PartialState(cpu=check_device(args.device) == "cpu", timeout=WAIT)
    source = open_source(args.src, captions=args.captions)
    vae = load_encoder(args.vae, args.vae_subfolder, device=args.device or state.device)
    if state.is_main_process:
        print("".join(f"{line}\n" for line in source.not_taken()), end="", file=sys.stderr)
    share = {"rank": state.process_index, "world": state.num_processes, "wait": state.wait_for_everyone}
    with show_progress("encoding", len(source)) as progress:
        index = encode(source, args.out, vae, args, **share, progress=progress)
    if not state.is_main_process:
        return None
    result = {"out": str(args.out), "count": index["count"], "skipped": len(index["skipped"])}
    if not args.json:
        left_out = f", {result['skipped']} unreadable left out" if result["skipped"] else ""
        print(f"{args.out}: {index['count']} samples in {len(index['shards'])} shards{left_out}; counts and sums agree")
    return result


def _inspect(args: Args, folder: Path) -> Json:
    data = LatentSet(folder)
    vae = load_encoder(args.vae or data.settings["vae"], args.vae_subfolder or data.settings["vae_subfolder"])
    count = min(len(data), 16)
    moments, labels = data.__getitems__([i * len(data) // count for i in range(count)])
    noise = torch.randn(moments[:, 0].shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pictures = as_pictures(decode(vae, posterior_sample(moments, noise)))
    save_frames([image_grid(pictures.clamp(-1, 1), 4)], folder / "inspect.png")
    names = [data.classes[label] for label in labels]
    if not args.json:
        print(f"{folder / 'inspect.png'}: {count} of {len(data)} samples, row by row: {', '.join(names)}")
    return {"out": str(folder / "inspect.png"), "count": count, "labels": names}
