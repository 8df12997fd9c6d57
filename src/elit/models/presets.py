"""The paper's networks by name, its figures beside them (section 4, Table 1).

Training TFLOPs an iteration (3 × forward × batch 256) at 256px / 512px, and parameters:

    DiT-XL/2         182 / 806     675M
    ELIT-DiT-XL/2    188 / 831     698M

Names are `[ELIT-]DiT-SIZE/PATCH`. Defaults are the 256px ones: the FLUX autoencoder's 16 channels at 32×32.
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from elit.models.dit import DiT, as_patch, as_size
from elit.models.interface import InterfaceSpec
from elit.models.layers import token_grid


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One row: the width and depth of the transformer, and ELIT's split of it into head, core and tail."""

    depth: int
    hidden_size: int
    num_heads: int
    split: tuple[int, int, int]


DIT = {
    "S": Preset(depth=12, hidden_size=384, num_heads=6, split=(2, 8, 2)),
    "B": Preset(depth=12, hidden_size=768, num_heads=12, split=(2, 8, 2)),
    "L": Preset(depth=24, hidden_size=1024, num_heads=16, split=(4, 16, 4)),
    "XL": Preset(depth=28, hidden_size=1152, num_heads=16, split=(4, 20, 4)),
}
PATCHES = (1, 2, 4)
GROUPS_PER_AXIS = 4  # 16 groups an image: windows of 4×4 tokens at 256px, 8×8 at 512px


def list_models() -> list[str]:
    """The names `create_model` takes."""
    return [f"{kind}DiT-{size}/{patch}" for kind in ("", "ELIT-") for size in DIT for patch in PATCHES]


def model_config(
    name: str,
    *,
    sample_size: int | Sequence[int] | None = None,
    in_channels: int | None = None,
    num_classes: int | None = None,
    split: tuple[int, int, int] | None = None,
    window: tuple[int, ...] | None = None,
    num_latents: int | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """The arguments of the network called `name`; see `create_model`."""
    if name not in list_models():
        close = difflib.get_close_matches(name, list_models(), n=3, cutoff=0.4) or list_models()[:3]
        raise ValueError(f"unknown model {name!r}; close names: {', '.join(close)} (elit.list_models() has all)")
    family, _, patch = name.rpartition("/")
    preset = DIT[family.rpartition("-")[2]]
    known = {"depth", "hidden_size", "num_heads", "patch_size", "mlp_ratio"}
    if unknown := sorted(set(overrides) - known):
        valid = sorted(known | {"split", "window", "num_latents"})
        raise ValueError(f"{name}: unknown override {unknown[0]!r}; valid ones: {', '.join(valid)}")
    config = {
        "sample_size": 32 if sample_size is None else sample_size,
        "in_channels": 16 if in_channels is None else in_channels,
        "num_classes": 1000 if num_classes is None else num_classes,
        "patch_size": int(patch),
        "depth": preset.depth,
        "hidden_size": preset.hidden_size,
        "num_heads": preset.num_heads,
    } | overrides
    for key in ("in_channels", "num_classes", "depth", "hidden_size", "num_heads"):
        if config[key] < 1:
            raise ValueError(f"{key}={config[key]}: give at least 1")
    if not name.startswith("ELIT-"):
        if split or window or num_latents:
            raise ValueError(f"{name}: a baseline takes no split, window or num_latents; ELIT-{name} does")
        return config
    if split and "depth" not in overrides:
        config["depth"] = sum(split)
    elif not split:
        split = preset.split if config["depth"] == preset.depth else default_split(config["depth"])
    window = window or default_window(config["sample_size"], config["patch_size"])
    spec = InterfaceSpec(split=split, window=tuple(window), num_latents=num_latents or math.prod(window))
    config["interface"] = spec.to_config()
    return config


def create_model(
    name: str,
    *,
    sample_size: int | Sequence[int] | None = None,
    in_channels: int | None = None,
    num_classes: int | None = None,
    **overrides: Any,
) -> DiT:
    """A freshly initialised network of the paper, by name.

    name: one of `list_models()`. sample_size: an int for square images, (T, H, W) for video; 32 by default.
    in_channels: 16 by default. num_classes: 1000 by default.
    overrides: depth, hidden_size, num_heads, patch_size, mlp_ratio, and for ELIT: split = blocks in (head, core,
    tail), window = tokens of a group along each axis (default: 4 groups an axis), num_latents = J (default: as
    many as spatial tokens in the window).

    Raises ValueError for an unknown name (with close ones) and for sizes that do not fit each other.
    """
    return DiT(
        **model_config(name, sample_size=sample_size, in_channels=in_channels, num_classes=num_classes, **overrides)
    )


def default_split(depth: int) -> tuple[int, int, int]:
    """About 70% of the blocks in the core, which the paper finds best (Table 4b)."""
    outer = max(1, round(0.15 * depth)) if depth >= 3 else 0
    return outer, depth - 2 * outer, outer


def default_window(sample_size: int | Sequence[int], patch_size: int | Sequence[int]) -> tuple[int, ...]:
    """4 groups an axis: windows of 4×4 at 16×16 tokens, 8×8 at 32×32; for video 2×4×4 at 8×16×16."""
    size, patch = as_size(sample_size), as_patch(patch_size, sample_size)
    try:
        grid = token_grid(size, patch, (GROUPS_PER_AXIS,) * len(size))
    except ValueError as error:
        raise ValueError(f"{error}; or give window= yourself (default: {GROUPS_PER_AXIS} groups an axis)") from None
    return tuple(length // GROUPS_PER_AXIS for length in grid)
