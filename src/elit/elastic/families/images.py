"""Classes that make images. DiT, PixArt, Stable Diffusion 3 and Z-Image have both branches of guidance in one batch."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elit.elastic.families.family import (
    Arguments,
    Family,
    Grid,
    Model,
    Places,
    cross_attention,
    of_image,
    of_sequence,
    widths,
)
from elit.models.layers import Rope

PADDED = 32  # Z-Image fills text and image up to multiples of this


def quarter(model: Model) -> Grid:
    """The paper's 4 groups an axis of the size that the model was made for, and no more than its 8×8 tokens."""
    size = model.config.sample_size
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return tuple(min(8, max(1, side // model.config.patch_size // 4)) for side in sides)


def pack_patches(latents: Tensor) -> Tensor:
    """(B, z, H, W) -> (B, H/2 · W/2, 4z): what Flux and Qwen-Image pipelines call packing."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def dit_condition(block: Model, arguments: Arguments) -> Tensor:
    embedder = block.norm1.emb
    time = embedder.timestep_embedder(embedder.time_proj(arguments["timestep"]).to(arguments["hidden_states"].dtype))
    # The table itself: the embedder drops labels at random in training, and Read must not draw in its place.
    return time + embedder.class_embedder.embedding_table(arguments["class_labels"])


@torch.compiler.disable
def flux_grids(transformer: nn.Module, arguments: Arguments) -> tuple[Grid, ...]:
    """From the coordinates (N, 3 or 4) of the tokens; read once, as pipelines give the same tensor each step."""
    ids = arguments["img_ids"]
    known = transformer.__dict__.get("_elastic_grid")
    if known is not None and known[0] is ids:
        return known[1]
    grids = []
    places = (ids[0] if ids.ndim == 3 else ids)[:, :3].cpu()
    for image in places.split(torch.unique_consecutive(places[:, 0], return_counts=True)[1].tolist()):
        columns = int((image[:, 1] == image[0, 1]).sum())
        row, column = torch.arange(len(image)) // columns, torch.arange(len(image)) % columns
        if not torch.equal(image[:, 1:] - image[0, 1:], torch.stack((row, column), 1).to(image)):
            raise ValueError("img_ids: not the coordinates of whole grids row by row; an elastified Flux needs those")
        grids.append((len(image) // columns, columns))
    transformer.__dict__["_elastic_grid"] = ids, tuple(grids)
    return tuple(grids)


FLUX = Family(  # double-stream, then single-stream blocks; one rotary table for text and image tokens
    blocks=("transformer_blocks", "single_transformer_blocks"),
    grids=flux_grids,
    # Kontext and Flux 2 put reference images behind the new one.
    num_references=lambda transformer, arguments: len(flux_grids(transformer, arguments)) - 1,
    noise=lambda arguments: arguments["timestep"],
    pack=pack_patches,
    output=1,
    per_token={"image_rotary_emb": of_sequence(0)},
    residuals=("controlnet_block_samples", "controlnet_single_block_samples"),
    unlabelled_branches=True,  # image to image, inpainting and Kontext
    streams=(("norm", "sample"), ("single_", "both"), ("add_|ff_context", "text")),
)


def flux2_condition(block: nn.Module, arguments: Arguments) -> Tensor:
    """The modulation of all double (B, 6d) or single blocks (B, 3d); with a cache of references it is one a token."""
    modulation = arguments["temb_mod_img" if "temb_mod_img" in arguments else "temb_mod"]
    return modulation if modulation.ndim == 2 else modulation[:, -1]


FLUX2 = replace(
    FLUX,
    pack=None,
    condition=flux2_condition,
    condition_width=lambda model, block: (6 if hasattr(block, "norm1_context") else 3) * widths(model)[0],
    joined=("single_transformer_blocks",),
    residuals=(),
    full_only={"kv_cache_mode": "the cache holds keys of all reference tokens"},
    streams=FLUX.streams[1:],
)


def qwen_images(arguments: Arguments) -> list[Grid]:
    """(frames, rows, columns) of the first sample's images; all samples of a batch are alike."""
    first = arguments["img_shapes"][0]
    return list(first) if isinstance(first, list) else [first]


def qwen21_mask(mask: Tensor, places: Places) -> Tensor:
    """(B, 1, 1, S): keys of the cached prefix, then the picture's."""
    prefix = torch.arange(mask.shape[-1] - places.tokens, device=mask.device)
    return mask.index_select(-1, torch.cat((prefix, len(prefix) + places.image)))


def qwen21_others(transformer: Model, arguments: Arguments) -> int:
    images = [rows * columns for _, rows, columns in qwen_images(arguments)]
    return int((~arguments["img_mask"][0]).sum()) + sum(images[:-1])


def z_grids(transformer: Model, arguments: Arguments) -> tuple[Grid, ...]:
    frames, rows, columns = arguments["x"][0].shape[1:]
    if any(image.shape != arguments["x"][0].shape for image in arguments["x"]):
        raise ValueError("x must have images of one size")
    patch, frame_patch = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
    return ((rows // patch, columns // patch),) * (frames // frame_patch)


def z_text(transformer: Model, arguments: Arguments) -> int:
    """Text and what fills it up, of the longest in the batch, and what fills up the image."""
    text = max(-(-len(caption) // PADDED) * PADDED for caption in arguments["cap_feats"])
    image = sum(rows * columns for rows, columns in z_grids(transformer, arguments))
    return text + -image % PADDED


def lumina_before(arguments: Arguments, others: int) -> int | list[int]:
    """The texts' own lengths: they are not filled up ahead of the image."""
    lengths = arguments["encoder_attention_mask"].sum(1).tolist()
    return lengths[0] if len(set(lengths)) == 1 else lengths


IMAGES: dict[str, Family] = {
    "DiTTransformer2DModel": Family(  # class labels, learned or sine positions added to the tokens
        window=quarter,
        condition=dit_condition,
        called_outside=lambda block: (
            block.norm1.emb.timestep_embedder,
            block.norm1.emb.class_embedder.embedding_table,
        ),
        per_token={"attention_mask": of_image(-1)},
        unconditional_half=1,
        streams=(("norm1.", "sample"),),
        attention=lambda block, image, text: image * image,
    ),
    "PixArtTransformer2DModel": Family(  # cross-attention to the text, one modulation for all blocks
        window=quarter,
        condition=lambda block, arguments: arguments["timestep"],  # (B, 6d): the modulation of all blocks
        condition_width=lambda model, block: 6 * widths(model)[0],
        per_token={"attention_mask": of_image(-1)},
        unconditional_half=0,
        streams=(("attn2.to_[kv]", "text"),),
        attention=cross_attention,
    ),
    "SD3Transformer2DModel": Family(  # joint attention with a text stream
        window=quarter,
        output=1,
        residuals=("block_controlnet_hidden_states",),
        unconditional_half=0,
        streams=(("norm1", "sample"), ("add_|ff_context", "text")),
        attention=lambda block, image, text: (image + text) ** 2 + (block.attn2 is not None) * image**2,
    ),
    "QwenImageTransformer2DModel": Family(
        grids=lambda transformer, arguments: tuple(
            (rows, columns) for frames, rows, columns in qwen_images(arguments) for _ in range(frames)
        ),
        num_references=lambda transformer, arguments: sum(image[0] for image in qwen_images(arguments)[1:]),
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
    ),
    "QwenImage21Transformer2DModel": Family(  # text and images are one causal sequence
        # The new image is the last of them; references stay whole, as the text does.
        grids=lambda transformer, arguments: (tuple(qwen_images(arguments)[-1][1:]),),
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
            "attention_mask": qwen21_mask,
        },
        text=qwen21_others,
        streams=((".", "both"),),
        # Text is causal, a row at a time; each image attends to all before it and to itself.
        attention=lambda block, image, text: image * (image + text) + text * text,
    ),
    "FluxTransformer2DModel": FLUX,
    "Flux2Transformer2DModel": FLUX2,
    "ChromaTransformer2DModel": replace(
        FLUX2,
        pack=pack_patches,
        # The modulation (B, 12, d) of image and text, of which the image's is 6d, or (B, 3, d) of a single block.
        condition=lambda block, arguments: arguments["temb"][:, :6].flatten(1),
        per_token={**FLUX.per_token, "attention_mask": of_sequence(1)},
        residuals=FLUX.residuals,
        full_only={},
    ),
    "ZImageTransformer2DModel": Family(  # one sequence: image first, then its padding, then the text
        blocks=("layers",),
        grids=z_grids,
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
        text=z_text,
        streams=(("adaLN", "sample"), (".", "both")),
    ),
    "Lumina2Transformer2DModel": Family(  # one sequence: text first
        blocks=("layers",),
        noise=lambda arguments: 1 - arguments["timestep"],
        condition_width=lambda model, block: min(model.config.hidden_size, 1024),
        sizes=lambda model: (model.config.hidden_size, model.config.num_attention_heads),
        joined=("layers",),
        before=lumina_before,
        per_token={"attention_mask": of_sequence(1), "image_rotary_emb": of_sequence(1)},
        unlabelled_branches=True,
        text=lambda model, arguments: int(arguments["encoder_attention_mask"].sum(1).max()),
        streams=(("norm1", "sample"), (".", "both")),
    ),
    "DiT": Family(  # this library's own baseline: for distillation at home
        blocks=("blocks",),
        grids=lambda transformer, arguments: (transformer.token_grid(arguments["x"].shape[2:]),),
        window=lambda model: tuple(min(8, max(1, side // 4)) for side in model.token_grid(model.sample_size)),
        noise=lambda arguments: 1 - arguments["t"],
        condition=lambda block, arguments: arguments["c"],
        sizes=lambda model: (model.config.hidden_size, model.config.num_heads),
        condition_width=lambda model, block: model.config.hidden_size,
        sample="x",
        tokens="x",
        per_token={"rope": lambda rope, places: Rope(rope.cos[places.image], rope.sin[places.image])},
        streams=(("modulation", "sample"),),
        attention=lambda block, image, text: image * image,
    ),
}
