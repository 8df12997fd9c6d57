"""Published checkpoints as networks of this library: ELIT's own ELIT-SiT and SiT, and the original SiT and DiT.

Weights have licences of their own. ELIT's and DiT's allow no commercial use; none are part of this library.
"""

import argparse
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from elit.models.layers import grid_positions
from elit.models.presets import SIZES
from elit.models.sit import SiT, sincos_positions

Kind = Literal["elit", "sit", "dit"]
CONVENTION_OF = {"elit": "noise", "sit": "data", "dit": "ddpm"}
LICENCE = "published weights keep their own licence; ELIT's and DiT's are for non-commercial use only"
ENTRIES = {"model", "ema", "opt", "args", "steps"}
TAIL_BLOCKS = {"S": 2, "B": 2, "L": 4, "XL": 4}

# Their names, ours. Each stands for a weight and, where there is one, a bias.
OUTER = {
    "x_embedder.proj": "patch_embed",
    "t_embedder.mlp.0": "conditioning.time.linear_1",
    "t_embedder.mlp.2": "conditioning.time.linear_2",
    "final_layer.adaLN_modulation.1": "final.modulation.linear",
    "final_layer.linear": "final.linear",
}
BLOCK = {
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "adaLN_modulation.1": "modulation.linear",
}
AXES = {  # of the tensors that tell the sizes
    "x_embedder.proj.weight": 4,
    "pos_embed": 3,
    "y_embedder.embedding_table.weight": 2,
    "blocks.0.mlp.fc1.weight": 2,
    "final_layer.linear.bias": 1,
}
READ, WRITE = "input_token_editor.adapters.0", "output_token_editor.adapters.0"
READ_ATTENTION = f"{READ}.fit_layer.latents_attend_to_patches.0"
WRITE_ATTENTION = f"{WRITE}.patches_attend_to_latents.0"
READ_MODULATION = f"{READ}.fit_layer.adaLN_modulation.1"
CROSS_ATTENTION = {"q_proj": "q", "kv_proj": "kv", "proj": "proj"}
SINGLE = {  # tensors with a name of their own
    f"{READ}.learned_query_embed": "latents",
    f"{READ}.pos_embed": "position",
    f"{READ}.latent_pos_embed": "latent_position",
    f"{WRITE}.pos_embed": "write_position",
    f"{READ}.fit_layer.read_ff.0.fc1.weight": "reader.mlp.fc1.weight",
    f"{READ}.fit_layer.read_ff.0.fc2.weight": "reader.mlp.fc2.weight",
    f"{WRITE}.write_ff.0.fc1.weight": "writer.mlp.fc1.weight",
    f"{WRITE}.write_ff.0.fc2.weight": "writer.mlp.fc2.weight",
    **{f"{READ_ATTENTION}.{part}.scale": f"reader.attention.{part}.scale" for part in ("q_norm", "k_norm")},
    **{f"{WRITE_ATTENTION}.{part}.scale": f"writer.attention.{part}.scale" for part in ("q_norm", "k_norm")},
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
    noise becomes the velocity of the same samples, DDIM's step an Euler step (`elit.models.sit.ddpm_clock`). The
    variances that the original SiT and DiT predict beside it, and a seventh modulation that no Read uses, are left out.

    Nothing in the file is run: tensors, plain values and argparse's Namespace are all that is read from it.
    The weights keep their licence: ELIT's and DiT's are for non-commercial use only.
    Raises ValueError, in one line, for a file that is missing, damaged, holds anything else, or does not fit.
    """
    name = f"file={str(path)!r}"
    content = _read(Path(path), name)
    weights, settings = _entries(content, name, "ema" if ema else "model")
    if kind is None:
        kind = _kind(weights, settings, name)
    elif kind not in CONVENTION_OF:
        raise ValueError(f"kind={kind!r}: give one of {', '.join(CONVENTION_OF)}")
    _check_settings(kind, settings, name)
    config = _config(weights, settings, name, kind, num_heads, tail_blocks)
    try:
        with torch.device("meta"):
            model = SiT(**config)
    except ValueError as error:
        raise ValueError(f"{name}: its sizes do not fit each other; {error}") from None
    model.load_state_dict(_translated(weights, model, name), assign=True)
    return model.eval()


def _read(path: Path, name: str) -> Any:
    """What torch.save put into a file, none of it run; tensors stay on disk until they are used."""
    if not path.is_file():
        raise ValueError(f"{name}: no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError) as error:
        # Bytes of any kind may come here, and torch's reader fails in as many ways; each is the file's fault.
        if found := re.search(r"Unsupported (?:global: GLOBAL|class) ([\w.]+)", str(error)):
            raise ValueError(f"{name}: holds a {found[1]}, which is no weight; not loaded, nothing was run") from None
        raise ValueError(f"{name}: truncated, damaged or no checkpoint of torch; download it again") from None


def _entries(content: Any, name: str, wanted: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and settings of a file: a training run's entries, or bare weights."""
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{name}: holds no weights by name")
    settings: Any = argparse.Namespace()
    weights = content
    if not any(isinstance(value, Tensor) for value in content.values()):
        if extra := sorted(set(content) - ENTRIES):
            raise ValueError(f"{name}: unknown entry {extra[0]!r}; a checkpoint has {', '.join(sorted(ENTRIES))}")
        if missing := sorted({wanted, "args"} - set(content)):
            raise ValueError(f"{name}: entry {missing[0]!r} is missing")
        weights, settings = content[wanted], content["args"]
    if not isinstance(settings, argparse.Namespace):
        raise ValueError(f"{name}: entry 'args' is a {type(settings).__name__}, expected a Namespace")
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        raise ValueError(f"{name}: entry {wanted!r} holds no weights by name")
    for key, value in weights.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ValueError(f"{name}: {key!r} is no tensor of floating-point weights")
    return weights, vars(settings)


def _kind(weights: dict[str, Tensor], settings: dict[str, Any], name: str) -> Kind:
    if "encoder_depth" in settings or _is_elit(weights, settings):
        return "elit"
    for kind in ("sit", "dit"):
        if str(settings.get("model")).lower().startswith(kind):
            return kind
    raise ValueError(f"{name}: bare weights, and those of SiT and DiT look the same; give kind as sit or dit")


def _is_elit(weights: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    editors = ("input_token_editor.", "output_token_editor.")
    return str(settings.get("model")).startswith("ELIT-") or any(key.startswith(editors) for key in weights)


def _check_settings(kind: Kind, settings: dict[str, Any], name: str) -> None:
    """Raises ValueError for a network that would load and then say something else than it should."""
    if settings.get("qk_norm"):
        raise ValueError(f"{name}: trained with qk_norm={settings['qk_norm']}; only files without it can be loaded")
    if kind == "dit":
        return
    for key, valid in (("path_type", ("linear",)), ("prediction", ("v", "velocity"))):
        if str(settings.get(key, valid[0])).lower() not in valid:
            raise ValueError(f"{name}: trained with {key}={settings[key]!r}; only {valid[-1]} can be loaded")


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
    depth, elit = len(numbers), _is_elit(weights, settings)
    if elit and kind != "elit":
        raise ValueError(f"{name}: an ELIT-SiT; kind={kind!r} does not fit")
    known = {*_names(depth, elit), "pos_embed"}
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
    if given is not None and given < 1:
        raise ValueError(f"num_heads={given}: give at least 1")
    return heads[width] if given is None else given


def _tail(settings: dict[str, Any], given: int | None, name: str) -> int:
    size = re.search(r"-(S|B|L|XL)/", str(settings.get("model")))
    if given is None and size is None:
        raise ValueError(f"{name}: its model {settings.get('model')!r} is no preset's; give tail_blocks")
    if given is not None and given < 0:
        raise ValueError(f"tail_blocks={given}: give 0 or more")
    return TAIL_BLOCKS[size[1]] if given is None and size else int(given or 0)


def _whole(settings: dict[str, Any], key: str, name: str) -> int:
    value = settings.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < (key == "elit_group_size"):
        raise ValueError(f"{name}: args.{key}={value!r}, expected a whole number")
    return value


def _names(depth: int, elit: bool) -> dict[str, str]:
    """{their name: ours} of all weights."""
    linear = OUTER | {f"blocks.{i}.{a}": f"blocks.{i}.{b}" for i in range(depth) for a, b in BLOCK.items()}
    single = {"y_embedder.embedding_table.weight": "conditioning.label.weight"}
    if elit:
        linear[READ_MODULATION] = "latent_interface.reader.modulation.linear"
        for theirs, ours in ((READ_ATTENTION, "reader"), (WRITE_ATTENTION, "writer")):
            parts = CROSS_ATTENTION.items()
            linear |= {f"{theirs}.{a}": f"latent_interface.{ours}.attention.{b}" for a, b in parts}
        single |= {theirs: f"latent_interface.{ours}" for theirs, ours in SINGLE.items()}
    return single | {f"{a}.{part}": f"{b}.{part}" for a, b in linear.items() for part in ("weight", "bias")}


def _translated(weights: dict[str, Tensor], model: SiT, name: str) -> dict[str, Tensor]:
    """Their weights by our names, float32, in memory of their own. Raises ValueError where a shape does not fit."""
    own, changed = model.state_dict(), _changed(weights, model)
    translated = {}
    for theirs, ours in _names(len(model.blocks), model.spec is not None).items():
        shape, change = changed.get(theirs, (tuple(own[ours].shape), _same))
        _check_shape(weights[theirs], shape, theirs, name)
        translated[ours] = change(weights[theirs].float()).clone(memory_format=torch.contiguous_format)
    _check_positions(weights["pos_embed"], model, name)
    return translated


def _changed(weights: dict[str, Tensor], model: SiT) -> dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]]:
    """What lies otherwise in their files: {their name: (its shape there, how it becomes ours)}."""
    (d, channels), p = (model.config.hidden_size, model.config.in_channels), model.patch_size[0]
    sign = -1 if model.config.convention == "noise" else 1  # theirs is noise − data
    # SiT and DiT may have said a variance beside every channel.
    double = model.config.convention != "noise" and len(weights["final_layer.linear.bias"]) == 2 * p * p * channels
    said = (2 if double else 1) * channels

    def first(value: Tensor) -> Tensor:
        return sign * value.unflatten(0, (p * p, said))[:, :channels].flatten(0, 1)

    def first_six(value: Tensor) -> Tensor:
        return value[: 6 * d]

    return {
        # A strided convolution is a linear layer over (patch row, patch column, channel).
        "x_embedder.proj.weight": ((d, channels, p, p), lambda value: value.permute(0, 2, 3, 1).flatten(1)),
        "final_layer.linear.weight": ((p * p * said, d), first),
        "final_layer.linear.bias": ((p * p * said,), first),
        f"{READ_MODULATION}.weight": ((7 * d, d), first_six),
        f"{READ_MODULATION}.bias": ((7 * d,), first_six),
    }


def _same(value: Tensor) -> Tensor:
    return value


def _check_shape(value: Tensor, shape: tuple[int, ...], key: str, name: str) -> None:
    if value.shape != shape:
        raise ValueError(f"{name}: {key!r} has shape {tuple(value.shape)}, expected {shape}")


def _check_positions(table: Tensor, model: SiT, name: str) -> None:
    """The file's fixed positions are those that `SiT` computes, or its output would be another."""
    grid = [length // model.patch_size[0] for length in model.sample_size]
    _check_shape(table, (1, grid[0] * grid[1], model.config.hidden_size), "pos_embed", name)
    computed = sincos_positions(grid_positions(grid, grid, table.device), model.config.hidden_size)
    if not torch.allclose(table[0].float(), computed, atol=1e-4):
        raise ValueError(f"{name}: 'pos_embed' is not the fixed sin-cos table; other positions cannot be loaded")


def _more(keys: list[str]) -> str:
    return f", and {len(keys) - 1} more" if len(keys) > 1 else ""
