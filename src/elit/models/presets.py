"""The paper's networks by name (section 4, Table 1); `elit.costs.paper` holds its figures for them.

Names and settings are data: the classes, which bring torch and diffusers, are loaded when a network is made.

Names are `[ELIT-]FAMILY-SIZE/PATCH`, for video with `-Video` behind. Defaults are the 256px ones: the FLUX
autoencoder's 16 channels at 32×32; for video 29 frames in CogVideoX's autoencoder, 16 channels at 8×32×32.

    DiT, U-ViT, HDiT    S, B, L, XL                   1000 classes of ImageNet
    MM-DiT              S, B, L, XL and Qwen-Image    text; Qwen-Image reads after block 8 and writes after block 52
    DiT, video          S, B, L, XL                   700 classes of Kinetics
    SiT                 S, B, L, XL                   the published checkpoints' network, 4 channels
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from elit.arguments import shortened, whole_number, whole_numbers
from elit.models.layout import KINDS, InterfaceSpec, Kind, as_patch, as_size, merged_blocks, token_grid
from elit.models.sizes import MOST, plain_settings

if TYPE_CHECKING:
    from elit.models.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One row: the width and depth of the transformer, and ELIT's split of it into head, core and tail."""

    kind: Kind
    depth: int
    hidden_size: int
    num_heads: int
    split: tuple[int, int, int]
    groups_per_axis: int = 4
    """16 groups an image: windows of 4×4 tokens at 256px, 8×8 at 512px."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Where this row differs from its network's own defaults."""


SIZES: dict[str, dict[str, Any]] = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6, "split": (2, 8, 2)},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12, "split": (2, 8, 2)},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16, "split": (4, 16, 4)},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16, "split": (4, 20, 4)},
}
FAMILIES = {family: KINDS[family.replace("-", "")] for family in ("DiT", "U-ViT", "HDiT", "MM-DiT", "SiT")}
PUBLISHED_SPLITS = {"SiT-XL": (8, 16, 4)}  # of checkpoints, where they are not the paper's
QWEN_IMAGE = Preset(
    kind=KINDS["MMDiT"],
    depth=60,
    hidden_size=3072,
    num_heads=24,
    split=(8, 44, 8),
    groups_per_axis=8,  # 1024px: 64×64 tokens in 64 windows of 8×8
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
            for family, kind in FAMILIES.items():
                name = f"{family}-{size}/{patch}"
                split = PUBLISHED_SPLITS.get(f"{family}-{size}", sizes["split"])
                rows[name] = Preset(kind=kind, settings={"patch_size": patch}, **sizes | {"split": split})
            video = {"patch_size": (1, patch, patch), "sample_size": (8, 32, 32), "num_classes": 700}
            rows[f"DiT-{size}/{patch}-Video"] = Preset(kind=KINDS["DiT"], settings=video, **sizes)
    rows["MM-DiT-Qwen-Image/2"] = QWEN_IMAGE
    return dict(sorted(rows.items(), key=lambda row: (list(FAMILIES).index(_family(row[0])), "Video" in row[0])))


def list_models() -> list[str]:
    """The names `create_model` takes."""
    return [f"{kind}{name}" for kind in ("", "ELIT-") for name in presets()]


def close_names(name: Any) -> list[str]:
    """Up to three names that a mistyped one may mean, the closest first; letters of either case."""
    plain = {known.lower().replace("-", ""): known for known in list_models()}
    wanted = str(name).lower().replace("-", "").replace("_", "")
    return [plain[name] for name in difflib.get_close_matches(wanted, plain, n=3, cutoff=0.7)]


def preset_of(name: str) -> Preset:
    """The row called `name`, with or without `ELIT-`. Raises ValueError naming close ones."""
    if name not in list_models():
        close = close_names(name)
        hint = (
            f"close names: {', '.join(close)} (elit.list_models() has all)" if close else "elit.list_models() has all"
        )
        raise ValueError(f"unknown model {shortened(name)}; {hint}")
    return presets()[name.removeprefix("ELIT-")]


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
) -> tuple[Kind, dict[str, Any]]:
    """The kind and the arguments of the network called `name`; see `create_model`."""
    preset = preset_of(name)
    given = overrides | {"sample_size": sample_size, "in_channels": in_channels, "num_classes": num_classes}
    given = {key: value for key, value in given.items() if value is not None}
    known = preset.kind.defaults
    if unknown := sorted(set(given) - set(known)):
        valid = ", ".join([*known, "split", "window", "num_latents"])
        raise ValueError(f"{name}: unknown setting {unknown[0]!r}; valid ones: {valid}")
    sizes = {"depth": preset.depth, "hidden_size": preset.hidden_size, "num_heads": preset.num_heads}
    config = dict(known) | sizes | preset.settings | given
    config |= plain_settings(config)
    if split is not None:
        split = cast(tuple[int, int, int], whole_numbers("split", split, "(4, 20, 4)", least=0))
    window = window if window is None else whole_numbers("window", window, "(4, 4)")
    num_latents = num_latents if num_latents is None else whole_number("num_latents", num_latents, 1, MOST)
    if not name.startswith("ELIT-"):
        if split or window or num_latents:
            raise ValueError(f"{name}: a baseline takes no split, window or num_latents; ELIT-{name} does")
        return _checked(preset.kind, config, None)
    if split and "depth" not in given:
        config["depth"] = sum(split)
    elif not split:
        split = preset.split if config["depth"] == preset.depth else default_split(config["depth"], preset.kind.name)
    window = window or default_window(config["sample_size"], config["patch_size"], preset.groups_per_axis)
    spec = InterfaceSpec(split=split, window=window, num_latents=num_latents or math.prod(window))
    config["interface"] = spec.to_config()
    return _checked(preset.kind, config, spec)


def _checked(kind: Kind, config: dict[str, Any], spec: InterfaceSpec | None) -> tuple[Kind, dict[str, Any]]:
    """Both as given. Raises ValueError where sizes do not fit each other."""
    size, patch = as_size(config["sample_size"]), as_patch(config["patch_size"], config["sample_size"])
    kind.check_sizes(size, patch, config["hidden_size"], config["num_heads"], config["depth"], spec)
    return kind, config


def create_model(
    name: str,
    *,
    sample_size: int | Sequence[int] | None = None,
    in_channels: int | None = None,
    num_classes: int | None = None,
    **overrides: Any,
) -> "Transformer":
    """A freshly initialised network of the paper, by name.

    name: one of `list_models()`. sample_size: an int for square images, (T, H, W) for video; 32 by default.
    in_channels: 16 by default. num_classes: 1000 by default; MM-DiT takes text instead.
    overrides: depth, hidden_size, num_heads, patch_size, mlp_ratio; for ELIT: split = blocks in (head, core, tail),
    window = tokens of a group along each axis (default: 4 groups an axis), num_latents = J (default: as many as
    spatial tokens in the window); for MM-DiT: text_encoder, text_features, text_length, pooled_features.

    Raises ValueError for an unknown name (with close ones) and for sizes that do not fit each other.
    """
    kind, config = model_config(
        name, sample_size=sample_size, in_channels=in_channels, num_classes=num_classes, **overrides
    )
    from elit.models.networks import NETWORKS  # seconds of imports, which names and sizes need not wait for

    return NETWORKS[kind.name](**config)


def default_split(depth: int, kind: str = "DiT") -> tuple[int, int, int]:
    """About 70% of the blocks in the core, which the paper finds best (Table 4b); HDiT's wide blocks lie inside it."""
    outer = max(1, round(0.15 * depth)) if depth >= 3 else 0
    if kind == "HDiT":
        outer = min(outer, merged_blocks(depth).start)
    return outer, depth - 2 * outer, outer


def default_window(
    sample_size: int | Sequence[int], patch_size: int | Sequence[int], groups: int = 4
) -> tuple[int, ...]:
    """4 groups an axis: windows of 4×4 at 16×16 tokens, 8×8 at 32×32; for video 2×4×4 at 8×16×16."""
    grid = token_grid(as_size(sample_size), as_patch(patch_size, sample_size), None)
    return tuple(-(-length // groups) for length in grid)


def _family(name: str) -> str:
    return max((family for family in FAMILIES if name.startswith(f"{family}-")), key=len)
