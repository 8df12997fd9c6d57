"""`load_released`: a published file's network, with sizes from its shapes and settings."""

import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from elit.models.presets import SIZES
from elit.models.sit import SiT
from elit.released.file import read_file
from elit.released.names import names, translated

Kind = Literal["elit", "sit", "dit"]
CONVENTION_OF = {"elit": "noise", "sit": "data", "dit": "ddpm"}
TAIL_BLOCKS = {"S": 2, "B": 2, "L": 4, "XL": 4}
EDITORS = ("input_token_editor.", "output_token_editor.")
AXES = {  # of the tensors that determine the sizes
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
    the original DiT; only bare weights need it. num_heads, tail_blocks: only for sizes other than the presets', which
    have 6, 12, 16, 16 heads and 2, 2, 4, 4 blocks after Write (S, B, L, XL). ema: the averaged weights, or with False
    those of the last step.

    For ELIT-SiT `model(x, 1 - t, y, budget=B)` is minus the authors' output at (x, t). A DiT's predicted noise becomes
    a velocity, and a DDIM step an Euler step (`elit.models.sit.ddpm_time`). The learned variances of SiT and DiT, and
    a seventh modulation that no Read uses, are left out.

    Nothing in the file is executed. The weights keep their licence: ELIT's and DiT's are for non-commercial use only.
    Raises ValueError for a file that is missing, damaged, not a checkpoint, or does not fit.
    """
    try:
        weights, settings = read_file(Path(path), "ema" if ema else "model")
        with torch.device("meta"):
            model = SiT(**_config(weights, settings, kind, num_heads, tail_blocks))
        model.load_state_dict(translated(weights, model), assign=True)
    except ValueError as error:
        raise ValueError(f"cannot load {str(path)!r}: {error}") from None
    return model.eval()


def _config(
    weights: dict[str, Tensor],
    settings: dict[str, Any],
    kind: Kind | None,
    num_heads: int | None,
    tail_blocks: int | None,
) -> dict[str, Any]:
    """Arguments of `SiT` from a file's shapes and settings. Raises ValueError."""
    model = str(settings.get("model"))
    elit = model.startswith("ELIT-") or any(key.startswith(EDITORS) for key in weights)
    if kind is None:
        kinds: tuple[Kind, ...] = ("sit", "dit")
        own = next((known for known in kinds if model.lower().startswith(known)), None)
        kind = "elit" if elit or "encoder_depth" in settings else own
    if kind is None:
        raise ValueError("bare weights of SiT and DiT are indistinguishable; kind must be sit or dit")
    if elit and kind != "elit":
        raise ValueError(f"kind must be elit for an ELIT-SiT, got {kind}")
    if settings.get("qk_norm"):
        raise ValueError(f"trained with qk_norm={settings['qk_norm']!r}, which is not supported")
    for key, valid in (("path_type", ("linear",)), ("prediction", ("v", "velocity"))):
        if kind != "dit" and str(settings.get(key, valid[0])).lower() not in valid:
            raise ValueError(f"trained with {key}={settings[key]!r}; only {valid[-1]} is supported")

    depth = len({match[1] for key in weights if (match := re.match(r"blocks\.(\d+)\.", key))})
    known = {*names(depth, elit), "pos_embed", "blocks.0.mlp.fc1.weight"}
    if missing := sorted(known - set(weights)):
        raise ValueError(f"missing weights: {len(missing)}, the first is {missing[0]!r}")
    if extra := sorted(set(weights) - known):
        raise ValueError(f"unknown weights: {len(extra)}, the first is {extra[0]!r}")
    for key, axes in AXES.items():
        if weights[key].ndim != axes or 0 in weights[key].shape:
            raise ValueError(f"{key!r} has shape {tuple(weights[key].shape)}, expected {axes} axes")

    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    heads = {sizes["hidden_size"]: sizes["num_heads"] for sizes in SIZES.values()}
    if num_heads is None and width not in heads:
        raise ValueError(f"num_heads must be given for width {width}; presets have {', '.join(map(str, heads))}")
    config: dict[str, Any] = {
        "sample_size": round(weights["pos_embed"].shape[1] ** 0.5) * patch,
        "in_channels": channels,
        "patch_size": patch,
        "hidden_size": width,
        "depth": depth,
        "num_heads": heads[width] if num_heads is None else num_heads,
        "mlp_ratio": weights["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "num_classes": len(weights["y_embedder.embedding_table.weight"]) - 1,
        "convention": CONVENTION_OF[kind],
    }
    if elit:
        size = re.search(r"-(S|B|L|XL)/", model)
        if tail_blocks is None and size is None:
            raise ValueError(f"tail_blocks must be given for model {model!r}")
        tail = TAIL_BLOCKS[size[1]] if tail_blocks is None and size else tail_blocks or 0
        window, head = settings.get("elit_group_size"), settings.get("encoder_depth")
        if not (isinstance(window, int) and isinstance(head, int) and window > 0 and 0 < head < depth - tail):
            raise ValueError(f"elit_group_size={window!r}, encoder_depth={head!r} and {tail} tail blocks of {depth}")
        split = [head, depth - head - tail, tail]
        config["interface"] = {"split": split, "window": [window, window], "num_latents": window**2}
    elif tail_blocks is not None:
        raise ValueError(f"tail_blocks must not be given without an interface, got {tail_blocks}")
    return config
