"""DiT, PixArt and Stable Diffusion 3: a batch holds both branches of guidance. And this library's own DiT."""

from torch import Tensor

from elit.elastic.families.family import Arguments, Family, Model, of_image, patch_grid, quarter, thousandths, widths
from elit.models.layers import Rope


def _dit_condition(block: Model, arguments: Arguments) -> Tensor:
    embedder = block.norm1.emb
    time = embedder.timestep_embedder(embedder.time_proj(arguments["timestep"]).to(arguments["hidden_states"].dtype))
    # The table itself: the embedder drops labels at random in training, and Read must not draw in its place.
    return time + embedder.class_embedder.embedding_table(arguments["class_labels"])


DIT = Family(  # class labels, learned or sine positions added to the tokens
    blocks=("transformer_blocks",),
    grids=patch_grid,
    window=quarter,
    noise=thousandths,
    condition=_dit_condition,
    called_outside=lambda block: (block.norm1.emb.timestep_embedder, block.norm1.emb.class_embedder.embedding_table),
    per_token={"attention_mask": of_image(-1)},
    unconditional_half=1,
    streams=(("norm1.", "sample"),),
    attention=lambda block, image, text: image * image,
)

PIXART = Family(  # cross-attention to the text, one modulation for all blocks
    blocks=("transformer_blocks",),
    grids=patch_grid,
    window=quarter,
    noise=thousandths,
    condition=lambda block, arguments: arguments["timestep"],  # (B, 6d): the modulation of all blocks
    condition_width=lambda model, block: 6 * widths(model)[0],
    per_token={"attention_mask": of_image(-1)},
    unconditional_half=0,
    streams=(("attn2.to_[kv]", "text"),),
    attention=lambda block, image, text: image * (image + text),
)

SD3 = Family(  # joint attention with a text stream
    blocks=("transformer_blocks",),
    grids=patch_grid,
    window=quarter,
    noise=thousandths,
    condition=lambda block, arguments: arguments["temb"],
    output=1,
    residuals=("block_controlnet_hidden_states",),
    unconditional_half=0,
    streams=(("norm1", "sample"), ("add_|ff_context", "text")),
    attention=lambda block, image, text: (image + text) ** 2 + (block.attn2 is not None) * image**2,
)


def _own_window(model: Model) -> tuple[int, ...]:
    return tuple(min(8, max(1, side // 4)) for side in model.token_grid(model.sample_size))


OWN_DIT = Family(  # the baseline: for distillation at home
    blocks=("blocks",),
    grids=lambda transformer, arguments: (transformer.token_grid(arguments["x"].shape[2:]),),
    window=_own_window,
    noise=lambda arguments: 1 - arguments["t"],
    condition=lambda block, arguments: arguments["c"],
    sizes=lambda model: (model.config.hidden_size, model.config.num_heads),
    condition_width=lambda model, block: model.config.hidden_size,
    sample="x",
    tokens="x",
    per_token={"rope": lambda rope, places: Rope(rope.cos[places.image], rope.sin[places.image])},
    streams=(("modulation", "sample"),),
    attention=lambda block, image, text: image * image,
)
