"""One forward of an elastified transformer, as its core blocks see it.

B batch, N image tokens, K latents, d width. A forward opens a `Call`; the first core block hands it the tokens and goes
on with latents, all core blocks take the positions of the carried tokens, and the last one gives all tokens back.

Under torch.compile what is here runs as it is, between graphs of diffusers' own forwards, Read and Write: traced, it
would compute each plan anew and have graphs for every budget.
"""

import dataclasses
import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from elit.elastic.families import Family
from elit.elastic.interface import ElasticInterface
from elit.elastic.token_order import Plan


class CoreBlock:
    """What a core block has in front of its diffusers class."""

    writes: bool
    """The last of the core."""

    @torch.compiler.disable(recursive=False)
    def elastic_forward(self: Any, **arguments: Any) -> Any:
        call = current_call.get()
        if call is None:
            raise RuntimeError("a core block of an elastified transformer runs inside the transformer's forward only")
        if call is PLAIN:
            return super().forward(**arguments)  # type: ignore[misc]
        return call.leave(self, super().forward(**call.enter(self, arguments)))  # type: ignore[misc]


class Call:
    """One forward of an elastified transformer."""

    def __init__(self, interface: ElasticInterface, family: Family, plan: Plan):
        self.interface, self.family, self.plan = interface, family, plan
        self.tokens: Tensor | None = None  # (B, N, d) as they were before Read, (B, K, d) just after
        self.start: Tensor | None = None
        self.taken: dict[str, tuple[Any, Any]] = {}

    @torch.compiler.disable(recursive=False)
    def enter(self, block: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        """A core block's arguments, for the carried tokens."""
        arguments = dict(arguments)
        if self.tokens is None:
            self.tokens = arguments[self.family.tokens]
            self.start = self.interface.start(self.tokens, self.family.condition(block, arguments), self.plan)
            arguments[self.family.tokens] = self.start
        if not self.plan.full:
            text = arguments.get("encoder_hidden_states")
            for name, take in self.family.per_token.items():
                if (value := arguments.get(name)) is not None:
                    if name not in self.taken or self.taken[name][0] is not value:
                        self.taken[name] = value, take(value, self.plan.carried, 0 if text is None else text.shape[1])
                    arguments[name] = self.taken[name][1]
        return arguments

    @torch.compiler.disable(recursive=False)
    def leave(self, block: nn.Module, output: Any) -> Any:
        """A core block's output; behind the last one, for all tokens again."""
        if not block.writes:
            return output
        place = self.family.output
        assert self.tokens is not None
        assert self.start is not None
        latents = output if place is None else output[place]
        tokens = self.interface.finish(self.tokens, self.start, latents, self.plan)
        return tokens if place is None else (*output[:place], tokens, *output[place + 1 :])


PLAIN: Any = object()
current_call: ContextVar[Any] = ContextVar("elit_call", default=None)
bypassed: ContextVar[bool] = ContextVar("elit_bypassed", default=False)


@contextmanager
def original() -> Iterator[None]:
    """Inside the block elastified transformers run without their interface: a teacher's forward, on shared weights."""
    token = bypassed.set(True)
    try:
        yield
    finally:
        bypassed.reset(token)


@contextmanager
def active(call: Any) -> Iterator[None]:
    token = current_call.set(call)
    try:
        yield
    finally:
        current_call.reset(token)


@dataclasses.dataclass(frozen=True)
class _Plain:
    """A core block whose arguments are those of latents already; what a checkpoint runs, and runs again in backward."""

    block: nn.Module

    def __call__(self, *args: Any) -> Any:
        with active(PLAIN):
            return self.block(*args)


def checkpointed(checkpoint: Any, block: nn.Module, *args: Any) -> Any:
    if not isinstance(block, CoreBlock):
        return checkpoint(block, *args)
    call = current_call.get()
    if call is PLAIN:
        return checkpoint(_Plain(block), *args)
    kind: Any = type(block)
    bound = signature_of(kind).bind(*args)
    bound.arguments.update(call.enter(block, bound.arguments))
    return call.leave(block, checkpoint(_Plain(block), *bound.args))


@torch.compiler.disable
@functools.cache
def signature_of(kind: Any) -> inspect.Signature:
    """Of `forward`, without self."""
    signature = inspect.signature(kind.forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])
