"""`load_released`: a published file's network, with sizes from its shapes and settings."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elit.arguments import shortened, whole_number
from elit.files import existing
from elit.models.presets import SIZES
from elit.models.sit import SiT
from elit.released.file import Kind, check_settings, is_elit, kind_of, read_file, weights_and_settings
from elit.released.names import names, translated

CONVENTION_OF = {"elit": "noise", "sit": "data", "dit": "ddpm"}
TAIL_BLOCKS = {"S": 2, "B": 2, "L": 4, "XL": 4}
AXES = {  # of the tensors that tell the sizes
    "x_embedder.proj.weight": 4,
    "pos_embed": 3,
    "y_embedder.embedding_table.weight": 2,
    "blocks.0.mlp.fc1.weight": 2,
    "final_layer.linear.bias": 1,
}


def load_released(
    path: str | Path,
    *,
    kind: Kind | None = None,
    num_heads: int | None = None,
    tail_blocks: int | None = None,
    ema: bool = True,
) -> SiT:
    """The network of a published checkpoint, a `.pt` file, in this library's terms: t = 0 noise, v = data − noise.

    kind: "elit" for ELIT-SiT and SiT by ELIT's authors, "sit" for the original SiT (linear path, velocity), "dit" for
    the original DiT. Files with settings beside the weights say it themselves; bare weights of SiT and DiT look alike.
    num_heads, tail_blocks: where the sizes are not a preset's; else 6, 12, 16, 16 heads and 2, 2, 4, 4 blocks after
    Write for S, B, L, XL. ema: the averaged weights; False = those of the last step. Bare weights are what they are.

    An ELIT-SiT answers `model(x, 1 - t, y, budget=B)` with minus what the authors' network says of (x, t). A DiT's
    noise becomes the velocity of the same samples, DDIM's step an Euler step (`elit.models.sit.ddpm_time`). The
    variances that the original SiT and DiT predict beside it, and a seventh modulation that no Read uses, are left out.

    Nothing in the file is run: tensors, plain values and argparse's Namespace are all that is read from it.
    The weights keep their licence: ELIT's and DiT's are for non-commercial use only.
    Raises ValueError, in one line, for a file that is missing, damaged, holds anything else, or does not fit.
    """
    name = f"file={str(path)!r}"
    num_heads = None if num_heads is None else whole_number("num_heads", num_heads, 1)
    tail_blocks = None if tail_blocks is None else whole_number("tail_blocks", tail_blocks, 0)
    if not isinstance(ema, bool):
        raise ValueError(f"ema={shortened(ema)}: give True or False")
    if kind is not None and not (isinstance(kind, str) and kind in CONVENTION_OF):
        raise ValueError(f"kind={shortened(kind)}: give one of {', '.join(CONVENTION_OF)}")
    content = read_file(existing(path, "file"), name)
    weights, settings = weights_and_settings(content, name, "ema" if ema else "model")
    if kind is None:
        kind = kind_of(weights, settings, name)
    check_settings(kind, settings, name)
    config = _config(weights, settings, name, kind, num_heads, tail_blocks)
    try:
        with torch.device("meta"):
            model = SiT(**config)
    except ValueError as error:
        raise ValueError(f"{name}: its sizes do not fit each other; {error}") from None
    model.load_state_dict(translated(weights, model, name), assign=True)
    return model.eval()


def _config(
    weights: dict[str, Tensor],
    settings: dict[str, Any],
    name: str,
    kind: Kind,
    num_heads: int | None,
    tail_blocks: int | None,
) -> dict[str, Any]:
    """`SiT`'s arguments from a file's shapes and settings, after a look at its names."""
    numbers = {match[1] for key in weights if (match := re.match(r"blocks\.(\d+)\.", key))}
    depth, elit = len(numbers), is_elit(weights, settings)
    if elit and kind != "elit":
        raise ValueError(f"{name}: an ELIT-SiT; kind={kind!r} does not fit")
    known = {*names(depth, elit), "pos_embed"}
    if missing := sorted(known - set(weights)):
        raise ValueError(f"{name}: {missing[0]!r} is missing{_more(missing)}")
    if extra := sorted(set(weights) - known):
        raise ValueError(f"{name}: {extra[0]!r} is not known in such a file{_more(extra)}")
    if depth == 0:
        raise ValueError(f"{name}: no 'blocks.0' in it")

    for key, axes in AXES.items():
        if weights[key].ndim != axes or 0 in weights[key].shape:
            raise ValueError(f"{name}: {key!r} has shape {tuple(weights[key].shape)}, expected {axes} axes")
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    side = round(weights["pos_embed"].shape[1] ** 0.5)
    config: dict[str, Any] = {
        "sample_size": side * patch,
        "in_channels": channels,
        "patch_size": patch,
        "hidden_size": width,
        "depth": depth,
        "num_heads": _heads(width, num_heads, name),
        "mlp_ratio": weights["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "num_classes": len(weights["y_embedder.embedding_table.weight"]) - 1,
        "convention": CONVENTION_OF[kind],
    }
    if elit:
        window, head = (_whole(settings, key, name) for key in ("elit_group_size", "encoder_depth"))
        tail = _tail(settings, tail_blocks, name)
        if head + tail >= depth:
            raise ValueError(f"{name}: {head} head and {tail} tail blocks of {depth} leave none between Read and Write")
        split = [head, depth - head - tail, tail]
        config["interface"] = {"split": split, "window": [window, window], "num_latents": window**2}
    elif tail_blocks is not None:
        raise ValueError(f"tail_blocks={tail_blocks}: this file's network has no interface; leave it out")
    return config


def _heads(width: int, given: int | None, name: str) -> int:
    heads = {sizes["hidden_size"]: sizes["num_heads"] for sizes in SIZES.values()}
    if given is None and width not in heads:
        raise ValueError(f"{name}: its width {width} is no preset's ({', '.join(map(str, heads))}); give num_heads")
    return heads[width] if given is None else given


def _tail(settings: dict[str, Any], given: int | None, name: str) -> int:
    size = re.search(r"-(S|B|L|XL)/", str(settings.get("model")))
    if given is None and size is None:
        raise ValueError(f"{name}: its model {settings.get('model')!r} is no preset's; give tail_blocks")
    if given is not None and given < 0:
        raise ValueError(f"tail_blocks={given}: give 0 or more")
    return TAIL_BLOCKS[size[1]] if given is None and size else given or 0


def _whole(settings: dict[str, Any], key: str, name: str) -> int:
    value = settings.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < (key == "elit_group_size"):
        raise ValueError(f"{name}: args.{key}={value!r}, expected a whole number")
    return value


def _more(keys: list[str]) -> str:
    return f", and {len(keys) - 1} more" if len(keys) > 1 else ""
