"""What published files call their weights, and how those lie in them.

N spatial tokens, d width, C channels, p patch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from elit.models.layers import grid_positions
from elit.models.sit import SiT, sincos_positions

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


def names(depth: int, elit: bool) -> dict[str, str]:
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


def translated(weights: dict[str, Tensor], model: SiT, name: str) -> dict[str, Tensor]:
    """Their weights by our names, float32, in memory of their own. Raises ValueError where a shape does not fit."""
    own, changed = model.state_dict(), _changed(weights, model)
    renamed = {}
    for theirs, ours in names(len(model.blocks), model.spec is not None).items():
        shape, change = changed.get(theirs, (tuple(own[ours].shape), _same))
        _check_shape(weights[theirs], shape, theirs, name)
        renamed[ours] = change(weights[theirs].detach().float()).clone(memory_format=torch.contiguous_format)
    _check_positions(weights["pos_embed"], model, name)
    return renamed


def _changed(weights: dict[str, Tensor], model: SiT) -> dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]]:
    """What lies otherwise in their files: {their name: (its shape there, how it becomes ours)}."""
    (d, channels), p = (model.config.hidden_size, model.config.in_channels), model.patch_size[0]
    sign = -1 if model.config.convention == "noise" else 1  # theirs is noise − data
    # SiT and DiT may have said a variance beside every channel.
    double = model.config.convention != "noise" and len(weights["final_layer.linear.bias"]) == 2 * p * p * channels
    outputs = (2 if double else 1) * channels

    def first(value: Tensor) -> Tensor:
        return sign * value.unflatten(0, (p * p, outputs))[:, :channels].flatten(0, 1)

    def first_six(value: Tensor) -> Tensor:
        return value[: 6 * d]

    return {
        # A strided convolution is a linear layer over (patch row, patch column, channel).
        "x_embedder.proj.weight": ((d, channels, p, p), lambda value: value.permute(0, 2, 3, 1).flatten(1)),
        "final_layer.linear.weight": ((p * p * outputs, d), first),
        "final_layer.linear.bias": ((p * p * outputs,), first),
        f"{READ_MODULATION}.weight": ((7 * d, d), first_six),
        f"{READ_MODULATION}.bias": ((7 * d,), first_six),
    }


def _same(value: Tensor) -> Tensor:
    return value


def _check_positions(table: Tensor, model: SiT, name: str) -> None:
    """The file's fixed positions are those that `SiT` computes, or its output would be another."""
    grid = [length // model.patch_size[0] for length in model.sample_size]
    _check_shape(table, (1, grid[0] * grid[1], model.config.hidden_size), "pos_embed", name)
    computed = sincos_positions(grid_positions(grid, grid, table.device), model.config.hidden_size)
    if not torch.allclose(table[0].float(), computed, atol=1e-4):
        raise ValueError(f"{name}: 'pos_embed' is not the fixed sin-cos table; other positions cannot be loaded")


def _check_shape(value: Tensor, shape: tuple[int, ...], key: str, name: str) -> None:
    if value.shape != shape:
        raise ValueError(f"{name}: {key!r} has shape {tuple(value.shape)}, expected {shape}")
