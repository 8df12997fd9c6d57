"""Wan with VACE, CogVideoX, HunyuanVideo 1.5 and LTX-2. Windows divide the pictures of their usual sizes."""

from torch import Tensor, nn

from elit.elastic.families.family import (
    Arguments,
    Family,
    Grid,
    Model,
    Places,
    of_image,
    patch_grid,
    thousandths,
    widths,
)


def _wan_condition(block: nn.Module, arguments: Arguments) -> Tensor:
    temb = arguments["temb"]  # (B, 6, d), or (B, N, 6, d) where each token has its own time
    return (temb.mean(1) if temb.ndim == 4 else temb).flatten(1)


def _wan_temb(temb: Tensor, places: Places) -> Tensor:
    return temb[:, places.image] if temb.ndim == 4 else temb


def _hints(model: Model) -> dict[int, nn.Module]:
    return dict(zip(model.config.vace_layers, model.vace_blocks, strict=True))


WAN = {
    "blocks": ("blocks",),
    "grids": patch_grid,
    "axes": 3,
    "window": lambda model: (3, 5, 4),  # 480p and 720p of 81 frames: 21×30×52 and 21×45×80 tokens
    "noise": thousandths,
    "condition": _wan_condition,
    "condition_width": lambda model, block: 6 * widths(model)[0],
    "per_token": {"rotary_emb": of_image(1), "temb": _wan_temb},  # (1, N, 1, h)
    "unlabelled_branches": True,
    "streams": (("attn2.(to_[kv]|add_)", "text"),),
    "attention": lambda block, image, text: image * (image + text),
}


def _cog_grid(transformer: Model, arguments: Arguments) -> tuple[Grid, ...]:
    """The grid of an input (B, frames, C, rows, columns)."""
    frames, _, rows, columns = arguments["hidden_states"].shape[1:]
    patch, frame_patch = transformer.config.patch_size, transformer.config.patch_size_t or 1
    return ((-(-frames // frame_patch), rows // patch, columns // patch),)


COGVIDEOX = Family(
    blocks=("transformer_blocks",),
    grids=_cog_grid,
    axes=3,
    window=lambda model: (2, 5, 5),  # 13×30×45 tokens
    noise=thousandths,
    pack=lambda latents: latents.transpose(1, 2),
    condition=lambda block, arguments: arguments["temb"],
    condition_width=lambda model, block: model.config.time_embed_dim,
    output=0,
    per_token={"image_rotary_emb": of_image(0)},
    unconditional_half=0,
    streams=(("norm.*linear", "sample"), (".", "both")),
    attention=lambda block, image, text: (image + text) ** 2,
)


def _hunyuan_grid(transformer: Model, arguments: Arguments) -> tuple[Grid, ...]:
    frames, rows, columns = arguments["hidden_states"].shape[2:]
    patch = transformer.config.patch_size
    return ((frames // transformer.config.patch_size_t, rows // patch, columns // patch),)


def _hunyuan_text(transformer: Model, arguments: Arguments) -> int:
    names = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
    return sum(arguments[name].shape[1] for name in names if arguments.get(name) is not None)


HUNYUAN15 = Family(  # text comes behind the image, and has no positions
    blocks=("transformer_blocks",),
    grids=_hunyuan_grid,
    axes=3,
    window=lambda model: (2, 5, 5),
    noise=thousandths,
    pack=None,  # a first frame and its mask are channels of the sample
    condition=lambda block, arguments: arguments["temb"],
    before=lambda arguments, others: 0,
    output=0,
    per_token={"freqs_cis": of_image(0)},
    text=_hunyuan_text,
    streams=(("norm1", "sample"), ("add_|ff_context", "text")),
    attention=lambda block, image, text: (image + text) ** 2,
)


def _rotary(tables: tuple[Tensor, Tensor], places: Places) -> tuple[Tensor, ...]:
    """(B, N, d), or (B, heads, N, h)."""
    return tuple(table.index_select(table.ndim - 2, places.image) for table in tables)


def _square(mask: Tensor, places: Places) -> Tensor:
    """(B, N, N)."""
    return mask.index_select(1, places.image).index_select(2, places.image)


LTX2 = Family(  # a stream of audio beside that of the video, which each block joins; it stays whole
    blocks=("transformer_blocks",),
    grids=lambda transformer, arguments: (tuple(arguments[name] for name in ("num_frames", "height", "width")),),
    axes=3,
    window=lambda model: (2, 4, 4),  # 121 frames of 512×768: 16×16×24 tokens
    noise=thousandths,
    pack=None,  # audio is the other half
    condition=lambda block, arguments: arguments["temb"][..., : 6 * arguments["hidden_states"].shape[2]].mean(1),
    condition_width=lambda model, block: 6 * widths(model)[0],
    output=0,
    per_token={
        "temb": of_image(1),  # one time for all tokens, or each its own
        "temb_ca_scale_shift": of_image(1),
        "temb_ca_gate": of_image(1),
        "video_rotary_emb": _rotary,
        "ca_video_rotary_emb": _rotary,
        "self_attention_mask": _square,
    },
    unconditional_half=0,
    streams=(
        (r"\.audio_(attn|ff|to_video_attn.to_[kv])|video_to_audio_attn.to_(q|out|gate)", "other"),
        ("attn2.to_[kv]", "text"),
    ),
    # Attention from and to audio is left out: a budget changes it little, and not the sequence that a picture has.
    attention=lambda block, image, text: image * (image + text),
)

WAN_VACE = Family(**WAN, hints=_hints)
WAN_VIDEO = Family(**WAN)
