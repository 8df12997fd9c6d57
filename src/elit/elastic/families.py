"""What differs between diffusers transformers, one `Family` a class. docs/elastify.md shows how to add one.

B batch, N image tokens, L text tokens, d width, h rotary width. `arguments` are a call's arguments by name: those of
the transformer's forward (`grids`, `noise`) or of a block's (`condition`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from elit.compat import write_count
from elit.models.layers import Rope

Grid = tuple[int, ...]
Arguments = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One diffusers class: where its tokens are and how its blocks are called."""

    blocks: tuple[str, ...]
    """Attributes that hold its blocks, in the order in which forward runs them."""
    grids: Callable[[Any, Arguments], tuple[Grid, ...]]
    """Token grids that make up the image sequence, one behind the other, (rows, columns) or (frames, rows, columns)."""
    axes: int = 2
    """Of a grid."""
    noise: Callable[[Arguments], Tensor]
    """The timestep as a noise level, 1 = noise, 0 = data; any shape."""
    condition: Callable[[nn.Module, Arguments], Tensor]
    """Of a block's call: the vector that conditions it (B, c)."""
    condition_chunks: int = 1
    """c / d."""
    sizes: Callable[[Any], tuple[int, int]] = lambda model: (
        model.config.num_attention_heads * model.config.attention_head_dim,
        model.config.num_attention_heads,
    )
    """Width d and number of heads."""
    sample: str = "hidden_states"
    """The transformer's argument that holds the noisy sample, batch first."""
    tokens: str = "hidden_states"
    """The block's argument that holds the image tokens (B, N, d)."""
    output: int | None = None
    """Where they are in the tuple that a block returns; None: it returns them alone."""
    per_token: Mapping[str, Callable[[Any, Tensor, int], Any]] = field(default_factory=dict)
    """The block's arguments with an entry an image token; how to take the carried ones' (value, places (K,), L)."""
    residuals: tuple[str, ...] = ()
    """Arguments of forward added to all image tokens behind blocks: not below full budget."""
    unconditional_half: int | None = None
    """Which half of a batch is the unconditional branch, where pipelines run both in one; None: they run it apart."""
    streams: tuple[tuple[str, str], ...] = ()
    """For costs: a pattern in a linear layer's name, and what it runs over: image (if none), text, both, sample."""
    attention: Callable[[nn.Module, int, int], int]
    """For costs: pairs of query and key in a block's attentions, given image and text tokens."""


def patch_grid(transformer: Any, arguments: Arguments) -> tuple[Grid, ...]:
    """Of an input (B, C, *size)."""
    size = arguments["hidden_states"].shape[2:]
    patch = transformer.config.patch_size
    patches = patch if isinstance(patch, tuple | list) else (patch,) * len(size)
    return (tuple(length // p for length, p in zip(size, patches, strict=True)),)


def thousandths(arguments: Arguments) -> Tensor:
    return arguments["timestep"] / 1000


def take(axis: int) -> Callable[[Tensor, Tensor, int], Tensor]:
    return lambda value, places, text: value.index_select(axis, places)


# --- DiT: class labels, learned or sine positions added to the tokens ------------------------------------------------


def _dit_condition(block: Any, arguments: Arguments) -> Tensor:
    embedder = block.norm1.emb
    time = embedder.timestep_embedder(embedder.time_proj(arguments["timestep"]).to(arguments["hidden_states"].dtype))
    # The table itself: the embedder drops labels at random in training, and Read must not draw in its place.
    return time + embedder.class_embedder.embedding_table(arguments["class_labels"])


DIT = Family(
    blocks=("transformer_blocks",),
    grids=patch_grid,
    noise=thousandths,
    condition=_dit_condition,
    per_token={"attention_mask": take(-1)},
    unconditional_half=1,
    streams=(("norm1.", "sample"),),
    attention=lambda block, image, text: image * image,
)

# --- PixArt: cross-attention to the text, one modulation for all blocks ----------------------------------------------

PIXART = Family(
    blocks=("transformer_blocks",),
    grids=patch_grid,
    noise=thousandths,
    condition=lambda block, arguments: arguments["timestep"],  # (B, 6d): the modulation of all blocks
    condition_chunks=6,
    per_token={"attention_mask": take(-1)},
    unconditional_half=0,
    streams=(("attn2.to_[kv]", "text"),),
    attention=lambda block, image, text: image * (image + text),
)

# --- Stable Diffusion 3: joint attention with a text stream ----------------------------------------------------------

SD3 = Family(
    blocks=("transformer_blocks",),
    grids=patch_grid,
    noise=thousandths,
    condition=lambda block, arguments: arguments["temb"],
    output=1,
    residuals=("block_controlnet_hidden_states",),
    unconditional_half=0,
    streams=(("norm1", "sample"), ("add_|ff_context", "text")),
    attention=lambda block, image, text: (image + text) ** 2 + (block.attn2 is not None) * image**2,
)

# --- Flux: two kinds of blocks, one rotary table for text and image tokens -------------------------------------------


@torch.compiler.disable
def _flux_grids(transformer: nn.Module, arguments: Arguments) -> tuple[Grid, ...]:
    """From the coordinates (N, 3) of the tokens; a pipeline hands in the same tensor each step, so it is read once."""
    ids = arguments["img_ids"]
    version = None if ids.is_inference() else write_count(ids)
    known = transformer.__dict__.get("_elastic_grid")
    if known is None or known[0] is not ids or known[1] != version:
        known = (ids, version, _raster_grids(ids[0] if ids.ndim == 3 else ids))
        transformer.__dict__["_elastic_grid"] = known
    return known[2]


def _raster_grids(ids: Tensor) -> tuple[Grid, ...]:
    """Raises ValueError where coordinates (image, row, column) do not run over whole grids, row by row."""
    grids = []
    for image in ids.cpu().split(torch.unique_consecutive(ids[:, 0].cpu(), return_counts=True)[1].tolist()):
        columns = int((image[:, 1] == image[0, 1]).sum())
        row, column = torch.arange(len(image)) // columns, torch.arange(len(image)) % columns
        if not torch.equal(image[:, 1:] - image[0, 1:], torch.stack((row, column), 1).to(image)):
            raise ValueError("img_ids: not the coordinates of whole grids row by row; an elastified Flux needs those")
        grids.append((len(image) // columns, columns))
    return tuple(grids)


def _flux_positions(tables: tuple[Tensor, Tensor], places: Tensor, text: int) -> tuple[Tensor, ...]:
    """(L + N, h) -> (L + K, h), cosine and sine; the text's rows come first."""
    return tuple(torch.cat((table[:text], table[text:][places])) for table in tables)


FLUX = Family(
    blocks=("transformer_blocks", "single_transformer_blocks"),
    grids=_flux_grids,
    noise=lambda arguments: arguments["timestep"],
    condition=lambda block, arguments: arguments["temb"],
    output=1,
    per_token={"image_rotary_emb": _flux_positions},
    residuals=("controlnet_block_samples", "controlnet_single_block_samples"),
    streams=(("norm", "sample"), ("single_", "both"), ("add_|ff_context", "text")),
    attention=lambda block, image, text: (image + text) ** 2,
)

# --- Qwen-Image: joint attention, rotary tables of image and text apart ----------------------------------------------


def _qwen_grids(transformer: nn.Module, arguments: Arguments) -> tuple[Grid, ...]:
    """Of the first sample's images (edited ones have several); all samples of a batch are alike."""
    first = arguments["img_shapes"][0]
    images = first if isinstance(first, list) else [first]
    return tuple((rows, columns) for frames, rows, columns in images for _ in range(frames))


QWEN = Family(
    blocks=("transformer_blocks",),
    grids=_qwen_grids,
    noise=lambda arguments: arguments["timestep"],
    # Edited images have a second half, their condition at t = 0.
    condition=lambda block, arguments: arguments["temb"][: len(arguments["hidden_states"])],
    output=1,
    per_token={
        "image_rotary_emb": lambda tables, places, text: (tables[0][places], tables[1]),
        "modulate_index": take(1),
    },
    residuals=("controlnet_block_samples",),
    streams=(("_mod", "sample"), ("add_|txt_mlp", "text")),
    attention=lambda block, image, text: (image + text) ** 2,
)

# --- Wan: video, cross-attention to the text -------------------------------------------------------------------------


def _wan_condition(block: nn.Module, arguments: Arguments) -> Tensor:
    temb = arguments["temb"]  # (B, 6, d), or (B, N, 6, d) where each token has its own time
    return (temb.mean(1) if temb.ndim == 4 else temb).flatten(1)


WAN = Family(
    blocks=("blocks",),
    grids=patch_grid,
    axes=3,
    noise=thousandths,
    condition=_wan_condition,
    condition_chunks=6,
    per_token={
        "rotary_emb": lambda tables, places, text: tuple(table[:, places] for table in tables),  # (1, N, 1, h)
        "temb": lambda temb, places, text: temb[:, places] if temb.ndim == 4 else temb,
    },
    streams=(("attn2.(to_[kv]|add_)", "text"),),
    attention=lambda block, image, text: image * (image + text),
)

# --- This library's own DiT, baseline: for distillation at home ------------------------------------------------------

OWN_DIT = Family(
    blocks=("blocks",),
    grids=lambda transformer, arguments: (transformer.token_grid(arguments["x"].shape[2:]),),
    noise=lambda arguments: 1 - arguments["t"],
    condition=lambda block, arguments: arguments["c"],
    sizes=lambda model: (model.config.hidden_size, model.config.num_heads),
    sample="x",
    tokens="x",
    per_token={"rope": lambda rope, places, text: Rope(rope.cos[places], rope.sin[places])},
    streams=(("modulation", "sample"),),
    attention=lambda block, image, text: image * image,
)

FAMILIES: dict[str, Family] = {
    "DiTTransformer2DModel": DIT,
    "QwenImageTransformer2DModel": QWEN,
    "FluxTransformer2DModel": FLUX,
    "SD3Transformer2DModel": SD3,
    "PixArtTransformer2DModel": PIXART,
    "WanTransformer3DModel": WAN,
    "DiT": OWN_DIT,
}


def family_of(transformer: object) -> Family:
    """The entry for a transformer's class. Raises ValueError where there is none."""
    name = type(transformer).__name__
    if name not in FAMILIES:
        raise ValueError(
            f"transformer: a {name} has no entry in elit.elastic.families; supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]


def all_blocks(transformer: nn.Module) -> list[nn.Module]:
    """All blocks in the order in which forward runs them."""
    return [block for name in family_of(transformer).blocks for block in getattr(transformer, name)]
