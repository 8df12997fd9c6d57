"""Qwen-Image, with a text stream, and Qwen-Image 2.1, whose text and images are one causal sequence."""

from typing import Any

import torch
from torch import Tensor, nn

from elit.elastic.families.family import (
    Arguments,
    Family,
    Grid,
    Model,
    Places,
    of_image,
    of_sequence,
    pack_patches,
    widths,
)


def _images(arguments: Arguments) -> list[Grid]:
    """(frames, rows, columns) of the first sample's images; all samples of a batch are alike."""
    first = arguments["img_shapes"][0]
    return list(first) if isinstance(first, list) else [first]


def _grids(transformer: nn.Module, arguments: Arguments) -> tuple[Grid, ...]:
    return tuple((rows, columns) for frames, rows, columns in _images(arguments) for _ in range(frames))


def _num_references(transformer: Model, arguments: Arguments) -> int:
    """Edited images come behind the new one; Qwen-Image-Layered makes several, and the last is its reference."""
    frames = [image[0] for image in _images(arguments)]
    if getattr(transformer.config, "use_layer3d_rope", False):
        return sum(frames[-1:]) if len(frames) > 1 else 0
    return sum(frames[1:])


QWEN = Family(
    blocks=("transformer_blocks",),
    grids=_grids,
    num_references=_num_references,
    noise=lambda arguments: arguments["timestep"],
    pack=pack_patches,
    # Edited images have a second half, their condition at t = 0.
    condition=lambda block, arguments: arguments["temb"][: len(arguments["hidden_states"])],
    output=1,
    per_token={
        "image_rotary_emb": lambda tables, places: (tables[0][places.image], tables[1]),
        "modulate_index": of_image(1),
    },
    residuals=("controlnet_block_samples",),
    streams=(("_mod", "sample"), ("add_|txt_mlp", "text")),
    attention=lambda block, image, text: (image + text) ** 2,
)


def _last_picture_grid(transformer: nn.Module, arguments: Arguments) -> tuple[Grid, ...]:
    """The grid of the new image, the last of them; references stay whole, as the text does."""
    return (tuple(_images(arguments)[-1][1:]),)


def _mask(mask: Any, places: Places) -> Any:
    """(B, 1, 1, S): keys of the cached prefix, then the picture's."""
    if not isinstance(mask, Tensor):
        raise ValueError(
            "attention_mask: a block mask of flex attention is for all tokens; set QwenImage21AttnProcessor"
        )
    prefix = torch.arange(mask.shape[-1] - places.tokens, device=mask.device)
    return mask.index_select(-1, torch.cat((prefix, len(prefix) + places.image)))


QWEN21 = Family(
    blocks=("transformer_blocks",),
    grids=_last_picture_grid,
    noise=lambda arguments: arguments["timestep"],
    pack=None,  # its autoencoder has a fourth channel
    # With causal_condition there is one more row, that of t = 0, which text and references take.
    condition=lambda block, arguments: arguments["modulation"][: len(arguments["hidden_states"])],
    condition_width=lambda model, block: 4 * widths(model)[0],
    joined=("transformer_blocks",),
    before=lambda arguments, others: others,
    per_token={
        "rotary_emb": of_sequence(0),
        "target_token_mask": of_sequence(0),
        "key_valid": of_sequence(1),
        "attention_mask": _mask,
    },
    text=lambda model, arguments: _others(arguments),
    streams=((".", "both"),),
    # Text is causal, a row at a time; each image attends to all before it and to itself.
    attention=lambda block, image, text: image * (image + text) + text * text,
)


def _others(arguments: Arguments) -> int:
    images = [rows * columns for _, rows, columns in _images(arguments)]
    text = int((~arguments["img_mask"][0]).sum())
    return text + sum(images[:-1])
