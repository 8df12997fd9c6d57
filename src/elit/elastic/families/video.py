"""Wan with VACE, CogVideoX, HunyuanVideo 1.5 and LTX-2. Windows divide the clips of their usual sizes."""

from dataclasses import replace

from torch import Tensor

from elit.elastic.families.family import Arguments, Family, Grid, Model, Places, cross_attention, of_image, widths


def wan_condition(block: Model, arguments: Arguments) -> Tensor:
    temb = arguments["temb"]  # (B, 6, d), or (B, N, 6, d) where each token has its own time
    return (temb.mean(1) if temb.ndim == 4 else temb).flatten(1)


WAN = Family(
    blocks=("blocks",),
    axes=3,
    window=lambda model: (3, 5, 4),  # 480p and 720p of 81 frames: 21×30×52 and 21×45×80 tokens
    condition=wan_condition,
    condition_width=lambda model, block: 6 * widths(model)[0],
    per_token={
        "rotary_emb": of_image(1),  # (1, N, 1, h)
        "temb": lambda temb, places: temb[:, places.image] if temb.ndim == 4 else temb,
    },
    unlabelled_branches=True,
    streams=(("attn2.(to_[kv]|add_)", "text"),),
    attention=cross_attention,
)


def cog_grid(transformer: Model, arguments: Arguments) -> tuple[Grid, ...]:
    """The grid of an input (B, frames, C, rows, columns)."""
    frames, _, rows, columns = arguments["hidden_states"].shape[1:]
    patch, frame_patch = transformer.config.patch_size, transformer.config.patch_size_t or 1
    return ((-(-frames // frame_patch), rows // patch, columns // patch),)


def hunyuan_text(transformer: Model, arguments: Arguments) -> int:
    names = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
    return sum(arguments[name].shape[1] for name in names if arguments.get(name) is not None)


def ltx2_rotary(tables: tuple[Tensor, Tensor], places: Places) -> tuple[Tensor, ...]:
    """(B, N, d), or (B, heads, N, h)."""
    return tuple(table.index_select(table.ndim - 2, places.image) for table in tables)


VIDEO: dict[str, Family] = {
    "WanTransformer3DModel": WAN,
    "WanVACETransformer3DModel": replace(
        WAN, hints=lambda model: dict(zip(model.config.vace_layers, model.vace_blocks, strict=True))
    ),
    "CogVideoXTransformer3DModel": Family(
        grids=cog_grid,
        axes=3,
        window=lambda model: (2, 5, 5),  # 13×30×45 tokens
        pack=lambda latents: latents.transpose(1, 2),
        condition_width=lambda model, block: model.config.time_embed_dim,
        output=0,
        per_token={"image_rotary_emb": of_image(0)},
        unconditional_half=0,
        streams=(("norm.*linear", "sample"), (".", "both")),
    ),
    "HunyuanVideo15Transformer3DModel": Family(  # text comes behind the image, and has no positions
        axes=3,
        window=lambda model: (2, 5, 5),
        pack=None,  # a first frame and its mask are channels of the sample
        before=lambda arguments, others: 0,
        output=0,
        per_token={"freqs_cis": of_image(0)},
        text=hunyuan_text,
        streams=(("norm1", "sample"), ("add_|ff_context", "text")),
    ),
    "LTX2VideoTransformer3DModel": Family(  # a stream of audio, which each block joins, stays whole beside the video's
        grids=lambda transformer, arguments: (tuple(arguments[name] for name in ("num_frames", "height", "width")),),
        axes=3,
        window=lambda model: (2, 4, 4),  # 121 frames of 512×768: 16×16×24 tokens
        pack=None,  # audio is the other half
        condition=lambda block, arguments: arguments["temb"][..., : 6 * arguments["hidden_states"].shape[2]].mean(1),
        condition_width=lambda model, block: 6 * widths(model)[0],
        output=0,
        per_token={
            "temb": of_image(1),  # one time for all tokens, or each its own
            "temb_ca_scale_shift": of_image(1),
            "temb_ca_gate": of_image(1),
            "video_rotary_emb": ltx2_rotary,
            "ca_video_rotary_emb": ltx2_rotary,
            "self_attention_mask": lambda mask, places: mask[:, places.image][:, :, places.image],  # (B, N, N)
        },
        unconditional_half=0,
        streams=(
            (r"\.audio_(attn|ff|to_video_attn.to_[kv])|video_to_audio_attn.to_(q|out|gate)", "other"),
            ("attn2.to_[kv]", "text"),
        ),
        # Attention from and to audio is left out: a budget changes it little, and not the sequence that a picture has.
        attention=cross_attention,
    ),
}
