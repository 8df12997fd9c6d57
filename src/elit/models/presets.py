"""The paper's networks by name (section 4, Table 1); `elit.costs.paper` holds its figures for them.

Names are `[ELIT-]FAMILY-SIZE/PATCH`, for video with `-Video` behind. Defaults are the 256px ones: the FLUX
autoencoder's 16 channels at 32×32; for video 29 frames in CogVideoX's autoencoder, 16 channels at 8×32×32.

    DiT, U-ViT, HDiT    S, B, L, XL                   1000 classes of ImageNet
    MM-DiT              S, B, L, XL and Qwen-Image    text; Qwen-Image reads after block 8 and writes after block 52
    DiT, video          S, B, L, XL                   700 classes of Kinetics
    SiT                 S, B, L, XL                   the published checkpoints' network, 4 channels
"""

import difflib
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from elit.models.dit import DiT
from elit.models.hdit import HDiT
from elit.models.mmdit import MMDiT
from elit.models.sit import SiT
from elit.models.sizes import InterfaceSpec, as_patch, as_size
from elit.models.transformer import Transformer
from elit.models.uvit import UViT
from elit.models.windows import Shape

FAMILIES: dict[str, type[Transformer]] = {"DiT": DiT, "U-ViT": UViT, "HDiT": HDiT, "MM-DiT": MMDiT, "SiT": SiT}
NETWORKS = {network.__name__: network for network in FAMILIES.values()}
"""The classes by name, as the `_class_name` of a config.json has it."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One row: the width and depth of the transformer, and ELIT's split of it into head, core and tail."""

    network: type[Transformer]
    depth: int
    hidden_size: int
    num_heads: int
    split: tuple[int, int, int]
    windows_per_axis: int = 4
    """16 windows an image: of 4×4 tokens at 256px, 8×8 at 512px."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from the network's own defaults."""


SIZES: dict[str, dict[str, Any]] = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6, "split": (2, 8, 2)},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12, "split": (2, 8, 2)},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16, "split": (4, 16, 4)},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16, "split": (4, 20, 4)},
}
PUBLISHED_SPLITS = {"SiT-XL": (8, 16, 4)}  # of checkpoints, where they are not the paper's
QWEN_IMAGE = Preset(
    network=MMDiT,
    depth=60,
    hidden_size=3072,
    num_heads=24,
    split=(8, 44, 8),
    windows_per_axis=8,  # 1024px: 64×64 tokens in 64 windows of 8×8
    settings={
        "sample_size": 128,
        "text_encoder": "Qwen/Qwen2.5-VL-7B-Instruct",
        "text_features": 3584,
        "text_length": 300,
        "pooled_features": 0,
    },
)
PATCHES = (1, 2, 4)


@cache
def presets() -> dict[str, Preset]:
    """Every row by its name, without `ELIT-`."""
    rows = {}
    for patch in PATCHES:
        for size, sizes in SIZES.items():
            for family, network in FAMILIES.items():
                name = f"{family}-{size}/{patch}"
                split = PUBLISHED_SPLITS.get(f"{family}-{size}", sizes["split"])
                rows[name] = Preset(network=network, settings={"patch_size": patch}, **sizes | {"split": split})
            video = {"patch_size": (1, patch, patch), "sample_size": (8, 32, 32), "num_classes": 700}
            rows[f"DiT-{size}/{patch}-Video"] = Preset(network=DiT, settings=video, **sizes)
    rows["MM-DiT-Qwen-Image/2"] = QWEN_IMAGE
    return dict(sorted(rows.items(), key=lambda row: (list(FAMILIES).index(_family(row[0])), "Video" in row[0])))


def list_models() -> list[str]:
    """The names `create_model` takes."""
    return [f"{prefix}{name}" for prefix in ("", "ELIT-") for name in presets()]


def close_names(name: str) -> list[str]:
    """Up to three names that a mistyped one may mean, the closest first; letters of either case."""
    plain = {known.lower().replace("-", ""): known for known in list_models()}
    wanted = name.lower().replace("-", "").replace("_", "")
    return [plain[name] for name in difflib.get_close_matches(wanted, plain, n=3, cutoff=0.7)]


def preset_of(name: str) -> Preset:
    """The row called `name`, with or without `ELIT-`. Raises ValueError naming close ones."""
    if name not in list_models():
        close = close_names(name)
        names = f"close names: {', '.join(close)}; " if close else ""
        raise ValueError(f"unknown model {name!r}; {names}elit.list_models() has all")
    return presets()[name.removeprefix("ELIT-")]


def defaults_of(network: type[Transformer]) -> dict[str, Any]:
    """Arguments of a class's constructor with their defaults, `interface` left out."""
    arguments = inspect.signature(network).parameters.values()
    return {each.name: each.default for each in arguments if each.name != "interface"}


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
) -> tuple[type[Transformer], dict[str, Any]]:
    """The class and the arguments of the network called `name`; see `create_model`."""
    preset = preset_of(name)
    given = overrides | {"sample_size": sample_size, "in_channels": in_channels, "num_classes": num_classes}
    given = {key: value for key, value in given.items() if value is not None}
    known = defaults_of(preset.network)
    if unknown := sorted(set(given) - set(known)):
        valid = ", ".join([*known, "split", "window", "num_latents"])
        raise ValueError(f"{name}: unknown setting {unknown[0]!r}; valid ones: {valid}")
    sizes = {"depth": preset.depth, "hidden_size": preset.hidden_size, "num_heads": preset.num_heads}
    config = known | sizes | preset.settings | given
    if not name.startswith("ELIT-"):
        if split or window or num_latents:
            raise ValueError(f"{name}: a baseline takes no split, window or num_latents; ELIT-{name} does")
        return preset.network, config
    if split and "depth" not in given:
        config["depth"] = sum(split)
    depth = config["depth"]
    split = split or (preset.split if depth == preset.depth else preset.network.default_split(depth))
    window = window or default_window(config["sample_size"], config["patch_size"], preset.windows_per_axis)
    spec = InterfaceSpec(split=split, window=window, num_latents=num_latents or math.prod(window))
    return preset.network, config | {"interface": spec.to_config()}


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
    network, config = model_config(
        name, sample_size=sample_size, in_channels=in_channels, num_classes=num_classes, **overrides
    )
    return network(**config)


def default_window(sample_size: int | Sequence[int], patch_size: int | Sequence[int], windows: int = 4) -> Shape:
    """4 windows an axis: of 4×4 tokens at 16×16, 8×8 at 32×32; for video 2×4×4 at 8×16×16."""
    sizes = zip(as_size(sample_size), as_patch(patch_size, sample_size), strict=True)
    return tuple(-(-max(1, length // p) // windows) for length, p in sizes)


def _family(name: str) -> str:
    return max((family for family in FAMILIES if name.startswith(f"{family}-")), key=len)
