"""Names and layouts of the weights in published files.

N spatial tokens, d width, C channels, p patch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from elit.models.sit import SiT, sincos_positions
from elit.models.windows import Windows

# Their names, ours; each for a weight and, if any, a bias.
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
    renamed = {}
    for theirs, ours in names(depth, elit).items():
        shape, change = changed.get(theirs, (tuple(own[ours].shape), lambda value: value))
        _check_shape(weights[theirs], shape, theirs)
        renamed[ours] = change(weights[theirs].detach().float()).clone(memory_format=torch.contiguous_format)

    grid = model.token_grid(model.sample_size)
    _check_shape(weights["pos_embed"], (1, grid[0] * grid[1], d), "pos_embed")
    positions = sincos_positions(Windows(grid, grid, 1, weights["pos_embed"].device).coordinates(), d)
    if not torch.allclose(weights["pos_embed"][0].float(), positions, atol=1e-4):
        raise ValueError("'pos_embed' is not the fixed sin-cos table; other positions are not supported")
    return renamed


def _check_shape(value: Tensor, shape: tuple[int, ...], key: str) -> None:
    if value.shape != shape:
        raise ValueError(f"{key!r} has shape {tuple(value.shape)}, expected {shape}")
