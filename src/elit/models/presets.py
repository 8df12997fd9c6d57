"""The paper's networks by name (section 4, Table 1); `elit.costs.flops` holds its figures for them.

Names are `[ELIT-]FAMILY-SIZE/PATCH`, for video with `-Video` behind. Defaults are the 256px ones: the FLUX
autoencoder's 16 channels at 32×32; for video 29 frames in CogVideoX's autoencoder, 16 channels at 8×32×32.

    DiT, U-ViT, HDiT    S, B, L, XL                   1000 classes of ImageNet
    MM-DiT              S, B, L, XL and Qwen-Image    text; Qwen-Image reads after block 8 and writes after block 52
    DiT, video          S, B, L, XL                   700 classes of Kinetics
    SiT                 S, B, L, XL                   the published checkpoints' network, 4 channels
"""

import difflib
import inspect
import itertools
import math
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from elit.config import require
from elit.models.dit import DiT
from elit.models.hdit import HDiT
from elit.models.mmdit import MMDiT
from elit.models.sit import SiT
from elit.models.transformer import Transformer
from elit.models.uvit import UViT
from elit.models.windows import InterfaceSpec, as_patch, as_size

FAMILIES: dict[str, type[Transformer]] = {"DiT": DiT, "U-ViT": UViT, "HDiT": HDiT, "MM-DiT": MMDiT, "SiT": SiT}
NETWORKS = {network.__name__: network for network in FAMILIES.values()}  # by the `_class_name` of a config.json
SIZES: dict[str, dict[str, Any]] = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6, "split": (2, 8, 2)},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12, "split": (2, 8, 2)},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16, "split": (4, 16, 4)},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16, "split": (4, 20, 4)},
}
# 1024px: 64×64 tokens in 64 windows of 8×8.
QWEN_IMAGE: dict[str, Any] = {"depth": 60, "hidden_size": 3072, "num_heads": 24, "split": (8, 44, 8), "windows": 8}
QWEN_IMAGE |= {"sample_size": 128, "text_encoder": "Qwen/Qwen2.5-VL-7B-Instruct", "text_features": 3584}
QWEN_IMAGE |= {"text_length": 300, "pooled_features": 0}


def register_model(family: str, network: type[Transformer]) -> None:
    """Gives a class derived from those here its names, FAMILY-SIZE/PATCH: "MyDiT-S/2", "ELIT-MyDiT-XL/4" and so on."""
    new = family not in FAMILIES and bool(re.fullmatch(r"(?!ELIT-)[\w-]+", family))
    require(new, "family", family, "a new name of letters, digits and dashes, without ELIT-")
    FAMILIES[family] = network
    presets.cache_clear()


@cache
def presets() -> dict[str, tuple[type[Transformer], dict[str, Any]]]:
    """Class and settings by name, without `ELIT-`; `split` and `windows` (along each axis) are ELIT's."""
    rows: dict[str, tuple[type[Transformer], dict[str, Any]]] = {}
    for family, network in FAMILIES.items():
        for kind in ("", "-Video") if family == "DiT" else ("",):
            for patch, size in itertools.product((1, 2, 4), SIZES):
                settings = {"patch_size": patch, "windows": 4} | SIZES[size]
                if kind:
                    settings |= {"patch_size": (1, patch, patch), "sample_size": (8, 32, 32), "num_classes": 700}
                if (family, size) == ("SiT", "XL"):
                    settings["split"] = (8, 16, 4)  # of the published checkpoint, not the paper's
                rows[f"{family}-{size}/{patch}{kind}"] = network, settings
        if family == "MM-DiT":
            rows["MM-DiT-Qwen-Image/2"] = network, QWEN_IMAGE
    return rows


def list_models() -> list[str]:
    """The names `create_model` takes."""
    return [f"{prefix}{name}" for prefix in ("", "ELIT-") for name in presets()]


def model_config(
    name: str,
    *,
    split: tuple[int, int, int] | None = None,
    window: tuple[int, ...] | None = None,
    num_latents: int | None = None,
    **settings: Any,
) -> tuple[type[Transformer], dict[str, Any]]:
    """The class and the arguments of the network called `name`; see `create_model`."""
    if name not in list_models():
        plain = {known.lower().replace("-", ""): known for known in list_models()}
        close = difflib.get_close_matches(name.lower().replace("-", "").replace("_", ""), plain, n=3, cutoff=0.7)
        names = f"close names: {', '.join(plain[each] for each in close)}; " if close else ""
        raise ValueError(f"unknown model {name!r}; {names}elit.list_models() has all")
    network, preset = presets()[name.removeprefix("ELIT-")]
    given = {key: value for key, value in settings.items() if value is not None}
    arguments = inspect.signature(network).parameters.values()
    known = {each.name: each.default for each in arguments if each.name != "interface"}
    if unknown := sorted(set(given) - set(known)):
        valid = ", ".join([*known, "split", "window", "num_latents"])
        raise ValueError(f"{name}: unknown setting {unknown[0]!r}; valid ones: {valid}")
    config = known | {key: value for key, value in preset.items() if key in known} | given
    if not name.startswith("ELIT-"):
        if split or window or num_latents:
            raise ValueError(f"{name}: a baseline takes no split, window or num_latents; ELIT-{name} does")
        return network, config
    if split and "depth" not in given:
        config["depth"] = sum(split)
    depth = config["depth"]
    split = split or (preset["split"] if depth == preset["depth"] else network.default_split(depth))
    if window is None:
        size = as_size(config["sample_size"])
        tokens = (max(1, side // p) for side, p in zip(size, as_patch(config["patch_size"], size), strict=True))
        window = tuple(math.ceil(side / preset["windows"]) for side in tokens)
    spec = InterfaceSpec(split=split, window=window, num_latents=num_latents or math.prod(window))
    return network, config | {"interface": spec.to_config()}


def create_model(
    name: str,
    *,
    sample_size: int | Sequence[int] | None = None,
    in_channels: int | None = None,
    num_classes: int | None = None,
    **overrides: Any,
) -> Transformer:
    """A freshly initialised network of the paper, by name.

    name: one of `list_models()`. sample_size: an int for square images, (T, H, W) for video; 32 by default.
    in_channels: 16 by default. num_classes: 1000 by default; MM-DiT takes text instead.
    overrides: depth, hidden_size, num_heads, patch_size, mlp_ratio; for ELIT: split = blocks in (head, core, tail),
    window = tokens of a window along each axis (default: 4 windows an axis), num_latents = J (default: as many as
    spatial tokens in the window); for MM-DiT: text_encoder, text_features, text_length, pooled_features.

    Raises ValueError for an unknown name (with close ones) and for sizes that do not fit each other.
    """
    sizes = {"sample_size": sample_size, "in_channels": in_channels, "num_classes": num_classes}
    network, config = model_config(name, **sizes, **overrides)
    return network(**config)
