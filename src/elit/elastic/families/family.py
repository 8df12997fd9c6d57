"""Differences between diffusers transformers: a `Family` has the places of its tokens, and how its blocks run.

B batch, N image tokens, K kept ones, L text tokens, S tokens of a whole sequence, d width, h rotary width.
`arguments` are a call's arguments by name: those of the transformer's forward, or of a block's where that is said.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from elit.compat import tree_map_only

Grid = tuple[int, ...]
Tree = Any  # a tensor, a plain value, or a dictionary, list or tuple of trees
Arguments = dict[str, Tree]
Model = Any  # a transformer of diffusers or its elastified subclass, a block, or a class of them: attributes differ
Pipeline = Any  # a pipeline of diffusers: its components and its call differ by class


class Places(NamedTuple):
    """Places of the kept tokens, for a block's arguments that have an entry for each token."""

    image: Tensor  # (K,) among the image tokens.
    sequence: Tensor
    """(S',) in the sequence of attention, where text and what else it holds stays whole; (B, S') where the
    image begins elsewhere in each sample."""
    tokens: int  # N.


Take = Callable[[Any, Places], Any]


def of_image(axis: int) -> Take:
    """For a tensor, or tensors, with the image tokens along `axis`; one entry for all of them stays."""

    def take(tensor: Tensor, places: Places) -> Tensor:
        return tensor if tensor.shape[axis] == 1 else tensor.index_select(axis, places.image)

    return lambda value, places: tree_map_only(Tensor, lambda tensor: take(tensor, places), value)


def of_sequence(axis: int) -> Take:
    """For a tensor, or tensors, with the whole sequence along `axis`."""

    def take(tensor: Tensor, places: Places) -> Tensor:
        if places.sequence.ndim == 1:
            return tensor.index_select(axis, places.sequence)
        rows = zip(tensor, places.sequence, strict=True)  # batch first
        return torch.stack([row.index_select(axis - 1, order) for row, order in rows])

    return lambda value, places: tree_map_only(Tensor, lambda tensor: take(tensor, places), value)


def text_length(arguments: Arguments) -> int:
    text = arguments.get("encoder_hidden_states")
    return 0 if text is None else text.shape[1]


def widths(model: Model) -> tuple[int, int]:
    heads = model.config.num_attention_heads
    return heads * model.config.attention_head_dim, heads


def patch_grid(transformer: Model, arguments: Arguments) -> tuple[Grid, ...]:
    """The grid of an input (B, C, *size)."""
    size, patch = arguments["hidden_states"].shape[2:], transformer.config.patch_size
    if isinstance(patch, int):
        patch = (transformer.config.get("patch_size_t"), patch, patch)[-len(size) :]
    return (tuple(length // p for length, p in zip(size, patch, strict=True)),)


def thousandths(arguments: Arguments) -> Tensor:
    return arguments["timestep"] / 1000


def joint_attention(block: nn.Module, image: int, text: int) -> int:
    return (image + text) ** 2


def cross_attention(block: nn.Module, image: int, text: int) -> int:
    return image * (image + text)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One class of transformers."""

    blocks: tuple[str, ...] = ("transformer_blocks",)
    """Attributes that hold its blocks, in the order in which forward runs them."""
    grids: Callable[[Model, Arguments], tuple[Grid, ...]] = patch_grid
    """Token grids that make up the image sequence, one behind the other, (rows, columns) or (frames, rows, columns)."""
    num_references: Callable[[Model, Arguments], int] = lambda model, arguments: 0
    """How many of those grids, the last ones, are reference images."""
    axes: int = 2
    """Axes of a grid."""
    window: Callable[[Model], Grid] = lambda model: (8, 8)
    """The default window."""
    noise: Callable[[Arguments], Tensor] = thousandths
    """The timestep as a noise level, 1 = noise, 0 = data; any shape."""
    condition: Callable[[Model, Arguments], Tensor] = lambda block, arguments: arguments["temb"]
    """The vector (B, c) that conditions a block, from its arguments."""
    condition_width: Callable[[Model, nn.Module], int] = lambda model, block: widths(model)[0]
    """c, for a transformer and the block that Read comes before."""
    sizes: Callable[[Model], tuple[int, int]] = widths
    """Width d and number of heads."""
    sample: str = "hidden_states"
    """The transformer's argument that holds the noisy sample, batch first; or a list with one a sample."""
    listed: bool = False
    """True where it is such a list."""
    pack: Callable[[Tensor], Tensor] | None = lambda latents: latents
    """Latents (B, z, ...) of pictures or clips -> that sample, where it is a tensor; of a list, what its tensors are
    stacked. None where the sample is more than those, or its latents are normalized in a way of their own."""
    tokens: str = "hidden_states"
    """The block's argument that holds the image tokens (B, N, d)."""
    joined: tuple[str, ...] = ()
    """Those of `blocks` where it holds the whole sequence instead (B, S, d)."""
    before: Callable[[Arguments, int], int | Sequence[int]] = lambda arguments, others: text_length(arguments)
    """Tokens ahead of the image in the sequence of attention, where `others` tokens are not of the image; one
    number, or one a sample."""
    output: int | None = None
    """Place of the image tokens in the tuple that a block returns."""
    per_token: Mapping[str, Take] = field(default_factory=dict)
    """The block's arguments with an entry a token, and how to take the kept ones: `of_image`, `of_sequence`."""
    hints: Callable[[Model], Mapping[int, nn.Module]] = lambda model: {}
    """Modules whose (first) output is added to all image tokens behind the block of that number."""
    residuals: tuple[str, ...] = ()
    """Arguments of forward added to all image tokens behind blocks: not below full budget."""
    full_only: Mapping[str, str] = field(default_factory=dict)
    """Other arguments that do not go with a lower budget, and why."""
    called_outside: Callable[[Model], Sequence[nn.Module]] = lambda block: ()
    """Modules of a block that are called before or after it too: sharding gathers them apart."""
    unconditional_half: int | None = None
    """The half of a batch that is the unconditional branch, where pipelines run both in one; None: they run two."""
    unlabelled_branches: bool = False
    """Pipelines run the branches apart; where they name neither, the second forward of a sample is unconditional."""
    text: Callable[[Model, Arguments], int] = lambda model, arguments: text_length(arguments)
    """For costs: tokens of a sample that are not of the image."""
    streams: tuple[tuple[str, str], ...] = ()
    """For costs: a pattern in a linear layer's name, and what it runs over: image (if none), text, both, sample, or
    other for what no budget changes."""
    attention: Callable[[Model, int, int], int] = joint_attention
    """For costs: pairs of query and key in a block's attentions, given image and text tokens."""
