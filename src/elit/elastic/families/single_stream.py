"""Z-Image and Lumina 2: text and image are one sequence from the first of the blocks that count."""

from elit.elastic.families.family import Arguments, Family, Grid, Model, of_sequence, patch_grid

PADDED = 32  # Z-Image fills text and image up to multiples of this


def _z_grids(transformer: Model, arguments: Arguments) -> tuple[Grid, ...]:
    if isinstance(arguments["x"][0], list):
        raise ValueError("x: several images a sample (Z-Image Omni); the interface takes one image a sample")
    sizes = {tuple(image.shape[1:]) for image in arguments["x"]}
    if len(sizes) > 1:
        raise ValueError(f"x: images of several sizes, {sorted(sizes)}; the interface takes a batch of one size")
    frames, rows, columns = sizes.pop()
    patch, frame_patch = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
    return ((rows // patch, columns // patch),) * (frames // frame_patch)


def _z_text(transformer: Model, arguments: Arguments) -> int:
    """Text and what fills it up, of the longest in the batch, and what fills up the image."""
    text = max(-(-len(caption) // PADDED) * PADDED for caption in arguments["cap_feats"])
    image = sum(rows * columns for rows, columns in _z_grids(transformer, arguments))
    return text + -image % PADDED


Z_IMAGE = Family(  # image first, then its padding, then the text
    blocks=("layers",),
    grids=_z_grids,
    noise=lambda arguments: 1 - arguments["t"],
    condition=lambda block, arguments: arguments["adaln_input"],
    condition_width=lambda model, block: min(model.config.dim, 256),
    sizes=lambda model: (model.config.dim, model.config.n_heads),
    sample="x",
    listed=True,
    pack=lambda latents: latents.unsqueeze(2) if latents.ndim == 4 else latents,
    tokens="x",
    joined=("layers",),
    before=lambda arguments, others: 0,
    per_token={"attn_mask": of_sequence(1), "freqs_cis": of_sequence(1)},
    residuals=("controlnet_block_samples",),
    unconditional_half=1,
    text=_z_text,
    streams=(("adaLN", "sample"), (".", "both")),
    attention=lambda block, image, text: (image + text) ** 2,
)


def _captions(arguments: Arguments) -> list[int]:
    return arguments["encoder_attention_mask"].sum(1).tolist()


def _lumina_before(arguments: Arguments, others: int) -> int | list[int]:
    """The text's own length: it is not filled up ahead of the image."""
    lengths = _captions(arguments)
    return lengths[0] if len(set(lengths)) == 1 else lengths


LUMINA2 = Family(
    blocks=("layers",),
    grids=patch_grid,
    noise=lambda arguments: 1 - arguments["timestep"],
    condition=lambda block, arguments: arguments["temb"],
    condition_width=lambda model, block: min(model.config.hidden_size, 1024),
    sizes=lambda model: (model.config.hidden_size, model.config.num_attention_heads),
    joined=("layers",),
    before=_lumina_before,
    per_token={"attention_mask": of_sequence(1), "image_rotary_emb": of_sequence(1)},
    unlabelled_branches=True,
    text=lambda model, arguments: max(_captions(arguments)),
    streams=(("norm1", "sample"), (".", "both")),
    attention=lambda block, image, text: (image + text) ** 2,
)
