"""Flux, Flux 2 and Chroma: double-stream, then single-stream blocks; one rotary table for text and image tokens."""

import torch
from torch import Tensor, nn

from elit.compat import write_count
from elit.elastic.families.family import Arguments, Family, Grid, Model, of_sequence, pack_patches, widths


@torch.compiler.disable
def _grids(transformer: nn.Module, arguments: Arguments) -> tuple[Grid, ...]:
    """From the coordinates (N, 3 or 4) of the tokens; read once, as pipelines give the same tensor each step."""
    ids = arguments["img_ids"]
    version = None if ids.is_inference() else write_count(ids)
    known = transformer.__dict__.get("_elastic_grid")
    if known is None or known[0] is not ids or known[1] != version:
        known = (ids, version, _raster_grids(ids[0] if ids.ndim == 3 else ids))
        transformer.__dict__["_elastic_grid"] = known
    return known[2]


def _raster_grids(ids: Tensor) -> tuple[Grid, ...]:
    """Raises ValueError where coordinates (image, row, column, …) do not run over whole grids, row by row."""
    grids = []
    ids = ids[:, :3].cpu()
    for image in ids.split(torch.unique_consecutive(ids[:, 0], return_counts=True)[1].tolist()):
        columns = int((image[:, 1] == image[0, 1]).sum())
        row, column = torch.arange(len(image)) // columns, torch.arange(len(image)) % columns
        if not torch.equal(image[:, 1:] - image[0, 1:], torch.stack((row, column), 1).to(image)):
            raise ValueError("img_ids: not the coordinates of whole grids row by row; an elastified Flux needs those")
        grids.append((len(image) // columns, columns))
    return tuple(grids)


def _num_references(transformer: nn.Module, arguments: Arguments) -> int:
    """Kontext and Flux 2 put reference images behind the new one."""
    return len(_grids(transformer, arguments)) - 1


FLUX = Family(
    blocks=("transformer_blocks", "single_transformer_blocks"),
    grids=_grids,
    num_references=_num_references,
    noise=lambda arguments: arguments["timestep"],
    pack=pack_patches,
    condition=lambda block, arguments: arguments["temb"],
    output=1,
    per_token={"image_rotary_emb": of_sequence(0)},
    residuals=("controlnet_block_samples", "controlnet_single_block_samples"),
    unlabelled_branches=True,  # image to image, inpainting and Kontext
    streams=(("norm", "sample"), ("single_", "both"), ("add_|ff_context", "text")),
    attention=lambda block, image, text: (image + text) ** 2,
)


def _flux2_condition(block: nn.Module, arguments: Arguments) -> Tensor:
    """The modulation of all double (B, 6d) or single blocks (B, 3d); with a cache of references it is one a token."""
    modulation = arguments["temb_mod_img" if "temb_mod_img" in arguments else "temb_mod"]
    return modulation if modulation.ndim == 2 else modulation[:, -1]


FLUX2 = Family(
    blocks=("transformer_blocks", "single_transformer_blocks"),
    grids=_grids,
    num_references=_num_references,
    noise=lambda arguments: arguments["timestep"],
    pack=None,
    condition=_flux2_condition,
    condition_width=lambda model, block: (6 if hasattr(block, "norm1_context") else 3) * widths(model)[0],
    joined=("single_transformer_blocks",),
    output=1,
    per_token={"image_rotary_emb": of_sequence(0)},
    full_only={"kv_cache_mode": "the cache holds keys of all reference tokens"},
    unlabelled_branches=True,
    streams=(("single_", "both"), ("add_|ff_context", "text")),
    attention=lambda block, image, text: (image + text) ** 2,
)


def _chroma_condition(block: Model, arguments: Arguments) -> Tensor:
    """The modulation (B, 12, d) of image and text, of which the image's is 6d, or (B, 3, d) of a single block."""
    return arguments["temb"][:, :6].flatten(1)


CHROMA = Family(
    blocks=("transformer_blocks", "single_transformer_blocks"),
    grids=_grids,
    num_references=_num_references,
    noise=lambda arguments: arguments["timestep"],
    pack=pack_patches,
    condition=_chroma_condition,
    condition_width=lambda model, block: (6 if hasattr(block, "norm1_context") else 3) * widths(model)[0],
    joined=("single_transformer_blocks",),
    output=1,
    per_token={"image_rotary_emb": of_sequence(0), "attention_mask": of_sequence(1)},
    residuals=("controlnet_block_samples", "controlnet_single_block_samples"),
    unlabelled_branches=True,
    streams=(("single_", "both"), ("add_|ff_context", "text")),
    attention=lambda block, image, text: (image + text) ** 2,
)
