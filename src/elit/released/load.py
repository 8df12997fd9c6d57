"""`load_released`: a published file's network, read without running anything in it, its sizes from its shapes."""

import argparse
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from elit.compat import refused_global
from elit.config import require
from elit.files import Json
from elit.models.presets import SIZES
from elit.models.sit import SiT, sincos_positions
from elit.models.windows import Windows

LICENCE = "published weights keep their own licence; ELIT's and DiT's are for non-commercial use only"
Kind = Literal["elit", "sit", "dit"]
CONVENTION_OF = {"elit": "noise", "sit": "data", "dit": "ddpm"}
TAIL_BLOCKS = {"S": 2, "B": 2, "L": 4, "XL": 4}
READ, WRITE = "input_token_editor.adapters.0", "output_token_editor.adapters.0"
READ_MODULATION = f"{READ}.fit_layer.adaLN_modulation.1"
# Their names, ours; each for a weight and, if any, a bias.
LINEAR = {
    "x_embedder.proj": "patch_embed",
    "t_embedder.mlp.0": "conditioning.time.linear_1",
    "t_embedder.mlp.2": "conditioning.time.linear_2",
    "final_layer.adaLN_modulation.1": "final.modulation.linear",
    "final_layer.linear": "final.linear",
}
BLOCK = {"attn.qkv": "attention.qkv", "attn.proj": "attention.proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
BLOCK |= {"adaLN_modulation.1": "modulation.linear"}
CROSS_ATTENTION = {
    f"{READ}.fit_layer.latents_attend_to_patches.0": "reader.attention",
    f"{WRITE}.patches_attend_to_latents.0": "writer.attention",
}
INTERFACE = {  # tensors with a name of their own
    f"{READ}.learned_query_embed": "latents",
    f"{READ}.pos_embed": "position",
    f"{READ}.latent_pos_embed": "latent_position",
    f"{WRITE}.pos_embed": "write_position",
    **{f"{READ}.fit_layer.read_ff.0.{part}.weight": f"reader.mlp.{part}.weight" for part in ("fc1", "fc2")},
    **{f"{WRITE}.write_ff.0.{part}.weight": f"writer.mlp.{part}.weight" for part in ("fc1", "fc2")},
}
# Numbers of axes of the tensors that determine the sizes.
AXES = {"x_embedder.proj.weight": 4, "pos_embed": 3, "y_embedder.embedding_table.weight": 2}
AXES |= {"blocks.0.mlp.fc1.weight": 2, "final_layer.linear.bias": 1}


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
    a seventh modulation that no Read uses, are left out. Nothing in the file is executed.
    Raises ValueError for a file that is missing, damaged, not a checkpoint, or does not fit.
    """
    try:
        weights, settings = read_file(Path(path), "ema" if ema else "model")
        with torch.device("meta"):
            model = SiT(**model_config(weights, settings, kind, num_heads, tail_blocks))
        model.load_state_dict(translated(weights, model), assign=True)
    except ValueError as error:
        raise ValueError(f"cannot load {str(path)!r}: {error}") from None
    return model.eval()


def read_file(path: Path, entry: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and settings of a checkpoint, or bare weights."""
    if not path.is_file():
        raise ValueError("no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch's reader fails in many ways on arbitrary bytes; each is the file's fault
        if refused := refused_global(error):
            raise ValueError(f"holds {refused}, which is not a weight; not loaded, nothing was run") from None
        raise ValueError("truncated, damaged or not a torch checkpoint; download it again") from None
    if not isinstance(content, dict):
        raise ValueError("holds no weights by name")
    settings: Any = argparse.Namespace()
    if not any(isinstance(value, Tensor) for value in content.values()):
        if missing := sorted({entry, "args"} - set(content)):
            raise ValueError(f"entry {missing[0]!r} is missing")
        content, settings = content[entry], content["args"]
    if not isinstance(settings, argparse.Namespace) or not isinstance(content, dict):
        raise ValueError(f"entries {entry!r} and 'args' must be weights by name and a Namespace")
    for key, value in content.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout != torch.strided:
            raise ValueError(f"{key!r} must be a tensor of floating-point weights")
    return content, vars(settings)


def model_config(
    weights: dict[str, Tensor], settings: Json, kind: Kind | None, num_heads: int | None, tail_blocks: int | None
) -> dict[str, Any]:
    """Arguments of `SiT` from a file's shapes and settings. Raises ValueError."""
    model = str(settings.get("model"))
    elit = model.startswith("ELIT-") or any(key.startswith((READ, WRITE)) for key in weights)
    if kind is None:
        named: dict[str, Kind] = {"sit": "sit", "dit": "dit"}
        kind = "elit" if elit or "encoder_depth" in settings else named.get(model[:3].lower())
    if kind is None:
        raise ValueError("bare weights of SiT and DiT are indistinguishable; kind must be sit or dit")
    require(not elit or kind == "elit", "kind", kind, "elit for an ELIT-SiT")
    if settings.get("qk_norm"):
        raise ValueError(f"trained with qk_norm={settings['qk_norm']!r}, which is not supported")
    for key, valid in (("path_type", ("linear",)), ("prediction", ("v", "velocity"))):
        if kind != "dit" and str(settings.get(key, valid[0])).lower() not in valid:
            raise ValueError(f"trained with {key}={settings[key]!r}; only {valid[-1]} is supported")

    depth = len({match[1] for key in weights if (match := re.match(r"blocks\.(\d+)\.", key))})
    known = {*names(depth, elit), "pos_embed", "blocks.0.mlp.fc1.weight"}
    for fault, keys in (("missing", known - set(weights)), ("unknown", set(weights) - known)):
        if keys:
            raise ValueError(f"{fault} weights: {len(keys)}, the first is {min(keys)!r}")
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
        "num_heads": num_heads or heads[width],
        "mlp_ratio": weights["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "num_classes": len(weights["y_embedder.embedding_table.weight"]) - 1,
        "convention": CONVENTION_OF[kind],
    }
    if not elit:
        return config
    size = re.search(r"-(S|B|L|XL)/", model)
    tail = TAIL_BLOCKS[size[1]] if tail_blocks is None and size else tail_blocks
    if tail is None:
        raise ValueError(f"tail_blocks must be given for model {model!r}")
    window, head = settings.get("elit_group_size"), settings.get("encoder_depth")
    if not (isinstance(window, int) and isinstance(head, int) and window > 0 and 0 < head < depth - tail):
        raise ValueError(f"elit_group_size={window!r}, encoder_depth={head!r} and {tail} tail blocks of {depth}")
    split = [head, depth - head - tail, tail]
    return config | {"interface": {"split": split, "window": [window, window], "num_latents": window**2}}


def names(depth: int, elit: bool) -> dict[str, str]:
    linear = LINEAR | {f"blocks.{i}.{a}": f"blocks.{i}.{b}" for i in range(depth) for a, b in BLOCK.items()}
    single = {"y_embedder.embedding_table.weight": "conditioning.label.weight"}
    if elit:
        linear[READ_MODULATION] = "latent_interface.reader.modulation.linear"
        single |= {theirs: f"latent_interface.{ours}" for theirs, ours in INTERFACE.items()}
        for theirs, ours in CROSS_ATTENTION.items():
            parts = {"q_proj": "q", "kv_proj": "kv", "proj": "proj"}
            linear |= {f"{theirs}.{a}": f"latent_interface.{ours}.{b}" for a, b in parts.items()}
            single |= {f"{theirs}.{p}_norm.scale": f"latent_interface.{ours}.{p}_norm.scale" for p in "qk"}
    return single | {f"{a}.{part}": f"{b}.{part}" for a, b in linear.items() for part in ("weight", "bias")}


def translated(weights: dict[str, Tensor], model: SiT) -> dict[str, Tensor]:
    """Their weights by our names, float32, in memory of their own. Raises ValueError where a shape does not fit."""
    (d, channels), p = (model.config.hidden_size, model.config.in_channels), model.patch_size[0]
    own, depth, elit = model.state_dict(), len(model.blocks), model.latent_interface is not None
    sign = -1 if model.config.convention == "noise" else 1  # theirs is noise − data
    # The original SiT and DiT predict a variance beside every channel.
    double = model.config.convention != "noise" and len(weights["final_layer.linear.bias"]) == 2 * p * p * channels
    outputs = (2 if double else 1) * channels

    def velocity(value: Tensor) -> Tensor:
        return sign * value.unflatten(0, (p * p, outputs))[:, :channels].flatten(0, 1)

    changed: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
        # A strided convolution is a linear layer over (patch row, patch column, channel).
        "x_embedder.proj.weight": ((d, channels, p, p), lambda value: value.permute(0, 2, 3, 1).flatten(1)),
        "final_layer.linear.weight": ((p * p * outputs, d), velocity),
        "final_layer.linear.bias": ((p * p * outputs,), velocity),
        f"{READ_MODULATION}.weight": ((7 * d, d), lambda value: value[: 6 * d]),
        f"{READ_MODULATION}.bias": ((7 * d,), lambda value: value[: 6 * d]),
    }
    grid = model.token_grid(model.sample_size)
    positions = sincos_positions(Windows(grid, grid).coordinates(), d)
    shapes = {theirs: tuple(own[ours].shape) for theirs, ours in names(depth, elit).items()}
    shapes |= {theirs: shape for theirs, (shape, _) in changed.items() if theirs in shapes}
    shapes["pos_embed"] = (1, *positions.shape)
    for key, shape in shapes.items():
        if weights[key].shape != shape:
            raise ValueError(f"{key!r} has shape {tuple(weights[key].shape)}, expected {shape}")
    if not torch.allclose(weights["pos_embed"][0].float(), positions, atol=1e-4):
        raise ValueError("'pos_embed' is not the fixed sin-cos table; other positions are not supported")
    renamed = {ours: (theirs, weights[theirs].detach().float()) for theirs, ours in names(depth, elit).items()}
    values = {ours: changed[name][1](x) if name in changed else x for ours, (name, x) in renamed.items()}
    return {ours: value.clone(memory_format=torch.contiguous_format) for ours, value in values.items()}
