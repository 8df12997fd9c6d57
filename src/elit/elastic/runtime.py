"""One forward of an elastified transformer, as its core blocks run it.

B batch, N image tokens, K latents, d width. A forward opens a `Call`; the first core block gives it the tokens and goes
on with latents, all core blocks take the positions of the kept tokens, and the last one gives all tokens back.

Under torch.compile what is here runs as it is, between graphs of diffusers' own forwards, Read and Write: traced, it
would compute the kept tokens anew and have graphs for every budget.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from elit import compat
from elit.compat import tree_map_only
from elit.elastic.context import REPLACED, within
from elit.elastic.families import all_blocks
from elit.elastic.families.family import Arguments, Family, Model, Places, Tree
from elit.elastic.interface import ElasticInterface, KeptTokens

PLAIN: Any = object()  # the call of a forward without interface
current_call: ContextVar[Any] = ContextVar("elit_call", default=None)


class CoreBlock:
    """The mixin of a core block, in front of its diffusers class."""

    writes = False  # It is the last of the core.
    joined = False  # Its tokens are the whole sequence, text and image.
    hint = False  # A module beside the core instead, whose output is added to the tokens in the core.

    @torch.compiler.disable(recursive=False)
    def elastic_forward(self: Model, **arguments: Tree) -> Tree:
        call = current_call.get()
        if call is None:
            raise RuntimeError(f"a core block runs inside the transformer's forward only: {REPLACED}")
        if call is PLAIN:
            return super().forward(**arguments)  # pyrefly: ignore[missing-attribute]
        return call.leave(self, super().forward(**call.enter(self, arguments)))  # pyrefly: ignore[missing-attribute]


class Call:
    """One forward of an elastified transformer. arguments: of that forward."""

    def __init__(self, interface: ElasticInterface, family: Family, kept: KeptTokens, arguments: Arguments):
        self.interface, self.family, self.kept, self.arguments = interface, family, kept, arguments
        self.tokens: Tensor | None = None  # (B, N, d) as they were before Read
        self.start: Tensor | None = None  # (B, K, d) just after
        self.before: int | Sequence[int] = 0
        self.others = 0  # tokens of a joined sequence that are not of the image
        self.places: Places | None = None
        self.taken: dict[str, tuple[Tree, Tree]] = {}

    @torch.compiler.disable(recursive=False)
    def enter(self, block: Model, arguments: Arguments) -> Arguments:
        """A core block's arguments, for the kept tokens."""
        if block.hint:
            return arguments
        arguments, name, count = dict(arguments), self.family.tokens, len(self.kept.order)
        if self.tokens is None:
            sequence = arguments[name]
            self.others = sequence.shape[1] - count if block.joined else 0
            if self.others < 0 or (not block.joined and sequence.shape[1] != count):
                raise ValueError(f"{name} must have the {count} tokens of its grids, got {sequence.shape[1]}")
            self.before = self.family.before(self.arguments, self.others)
            self.tokens = _image_of(sequence, self.before, count) if block.joined else sequence
            self.start = self.interface("start", self.tokens, self.family.condition(block, arguments), self.kept)
            arguments[name] = _with_image(sequence, self.before, count, self.start) if block.joined else self.start
        if not self.kept.full:
            if self.places is None:
                sequence = _sequence_places(self.before, self.others, self.kept)
                self.places = Places(self.kept.kept, sequence, count)
            more = {name: self.take_masks for name in arguments if name.endswith("kwargs")}
            for name, take in {**more, **self.family.per_token}.items():
                if (value := arguments.get(name)) is not None:
                    if name not in self.taken or self.taken[name][0] is not value:
                        self.taken[name] = value, take(value, self.places)
                    arguments[name] = self.taken[name][1]
        return arguments

    def take_masks(self, given: Tree, places: Places) -> Tree:
        """The masks in attention's keyword arguments, along each axis of all tokens, or of all of the image."""
        count = len(self.kept.order)
        whole = max(self.others, self.before if isinstance(self.before, int) else 0) + count

        def take(mask: Tensor) -> Tensor:
            for axis in range(mask.ndim):
                if mask.shape[axis] in (whole, count) and places.sequence.ndim == 1:
                    mask = mask.index_select(axis, places.sequence if mask.shape[axis] == whole else places.image)
            return mask

        masks = {name: tree_map_only(Tensor, take, value) for name, value in given.items() if "mask" in name}
        return {**given, **masks}

    @torch.compiler.disable(recursive=False)
    def leave(self, block: Model, output: Tree) -> Tree:
        """A core block's output; behind the last one, for all tokens again."""
        if block.hint and not self.kept.full:
            return output[0].index_select(1, self.kept.kept), *output[1:]
        if not block.writes:
            return output
        place = self.family.output if isinstance(output, tuple) else None
        sequence = output if place is None else output[place]
        kept = len(self.kept.kept)
        latents = _image_of(sequence, self.before, kept) if block.joined else sequence
        tokens = self.interface("finish", self.tokens, self.start, latents, self.kept)
        if block.joined:
            tokens = _with_image(sequence, self.before, kept, tokens)
        return tokens if place is None else (*output[:place], tokens, *output[place + 1 :])


def _image_of(sequence: Tensor, before: int | Sequence[int], count: int) -> Tensor:
    """The `count` image tokens (B, count, d) of a sequence (B, S, d), which begin behind `before` others."""
    if isinstance(before, int):
        return sequence[:, before : before + count]
    return torch.stack([row[first : first + count] for row, first in zip(sequence, before, strict=True)])


def _with_image(sequence: Tensor, before: int | Sequence[int], count: int, image: Tensor) -> Tensor:
    """The sequence with other tokens in the place of its `count` image tokens."""
    if isinstance(before, int):
        return torch.cat((sequence[:, :before], image, sequence[:, before + count :]), 1)
    rows = zip(sequence, before, image, strict=True)
    return torch.stack([torch.cat((row[:first], new, row[first + count :])) for row, first, new in rows])


def _sequence_places(before: int | Sequence[int], others: int, kept: KeptTokens) -> Tensor:
    """See `Places.sequence`; a text that is a stream of its own lies before the image."""
    count, places = len(kept.order), kept.kept
    if not isinstance(before, int):
        return torch.stack([_sequence_places(first, others, kept) for first in before])
    end = torch.arange(before + count, max(others, before) + count, device=places.device)
    return torch.cat((torch.arange(before, device=places.device), before + places, end))


def check_forwards(model: Model, what: str, advice: str) -> None:
    """Raises ValueError where something has taken the place of its forward, or of its blocks'."""
    changed = [module for module in (model, *all_blocks(model)) if "forward" in vars(module)]
    if not all(map(compat.is_hook, changed)):
        raise ValueError(f"cannot {what} whose forward was replaced: {REPLACED}")
    if changed:
        raise ValueError(f"cannot {what} with hooks on its forward: {advice}")


def checkpointed(checkpoint: Callable[..., Tree], block: nn.Module, *args: Tree) -> Tree:
    """`checkpoint(block, *args)`, with Read and Write outside of what runs again in the backward pass."""
    call = current_call.get()
    if not isinstance(block, CoreBlock):
        return checkpoint(block, *args)
    plain = functools.partial(_run_plain, block)
    if call is PLAIN:
        return checkpoint(plain, *args)
    bound = signature_of(type(block)).bind(*args)
    bound.arguments.update(call.enter(block, bound.arguments))
    return call.leave(block, checkpoint(plain, *bound.args))


def _run_plain(block: nn.Module, *args: Tree) -> Tree:
    """A core block whose arguments are those of latents already."""
    with within(current_call, PLAIN):
        return block(*args)


@torch.compiler.disable
@functools.cache
def signature_of(kind: Model) -> inspect.Signature:
    """The signature of `forward`, without self."""
    signature = inspect.signature(kind.forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])
