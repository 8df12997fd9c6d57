"""The network as a sampler runs it: in another dtype, compiled, or as it is."""

import copy
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from elit.arguments import shortened
from elit.compat import write_count
from elit.models.transformer import Transformer

# By network: the state of its weights that the copies were made from, and the copies by dtype.
_copies: WeakKeyDictionary[Transformer, tuple[Any, dict[torch.dtype, Transformer]]] = WeakKeyDictionary()
_compiled: WeakKeyDictionary[Transformer, Transformer] = WeakKeyDictionary()


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype from its name, such as "bfloat16"; others as they are. Raises ValueError for none of floating point."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found is None and dtype is None:
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise ValueError(f"dtype={shortened(dtype)}: give torch.float32, torch.bfloat16 or torch.float16")
    return found


def runner(
    model: Transformer, dtype: torch.dtype | str | None = None, *, compile: bool = False
) -> Callable[..., Tensor]:
    """A callable with the arguments of `model`'s forward, whose x may be float32 and whose output is the dtype's.

    Norms, softmax and rotation compute in float32 whatever the dtype. Raises ValueError for a dtype that is none of
    floating point.
    """
    wanted = as_dtype(dtype)
    network = model if wanted is None or wanted == model.dtype else in_dtype(model, wanted)
    if not compile:
        return lambda x, *rest, **options: network(x.to(network.dtype), *rest, **options)
    compiled = as_compiled(network)

    def run(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(x.to(network.dtype), *rest, **options).clone()  # a CUDA graph writes there again

    return run


def in_dtype(model: Transformer, dtype: torch.dtype) -> Transformer:
    """A copy in `dtype`, kept as long as `model` lives and its weights do not change."""
    state = model.device, [(id(p), write_count(p)) for p in model.parameters()]
    if model not in _copies or _copies[model][0] != state:
        _copies[model] = state, {}
    made = _copies[model][1]
    if dtype not in made:
        made[dtype] = copy.deepcopy(model).to(dtype).eval()
    return made[dtype]


def as_compiled(model: Transformer) -> Transformer:
    """The same weights behind a compiled forward. Sizes are dynamic, so all budgets but 1 share a compilation."""
    if model not in _compiled:
        twin = copy.copy(model)  # the modules themselves, so that the network stays as it was
        twin.compile(dynamic=True, mode="reduce-overhead" if model.device.type == "cuda" else None)
        _compiled[model] = twin
    return _compiled[model]
