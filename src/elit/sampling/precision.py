"""Networks in another dtype, and compiled ones."""

import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from elit.compat import copy_all
from elit.models.transformer import Transformer

# By network: how it was built when the copies were made, and the copies by dtype.
_copies: WeakKeyDictionary[Transformer, tuple[Any, dict[torch.dtype, Transformer]]] = WeakKeyDictionary()
_compiled: WeakKeyDictionary[Transformer, Transformer] = WeakKeyDictionary()


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype from its name, such as "bfloat16"; others as they are. Raises ValueError unless it is floating point."""
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved is None and dtype is None:
        return None
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point or resolved.itemsize < 2:
        raise ValueError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype!r}")
    return resolved


def in_dtype(model: Transformer, dtype: torch.dtype) -> Transformer:
    """A copy in `dtype`, kept as long as `model` lives and is built as it was; its weights are those of now.

    They are copied anew each time: a write through `.data`, as when peft merges an adapter, leaves no trace to look
    for, and one pass over the weights is little beside a sampling run.
    """
    built = model.device, _structure(model)
    if model not in _copies or _copies[model][0] != built:
        _copies[model] = built, {}
    copies = _copies[model][1]
    with torch.inference_mode(False), torch.no_grad():  # a copy made in inference mode could not be written to later
        if dtype not in copies:
            copies[dtype] = copy.deepcopy(model).to(dtype).eval()
        else:
            copy_all(_tensors(copies[dtype]), _tensors(model))
    return copies[dtype]


def _tensors(model: Transformer) -> list[Tensor]:
    return [value.detach() for value in (*model.parameters(), *model.buffers())]


def _structure(model: Transformer) -> list[tuple[Any, ...]]:
    """What a copy has beside weights: of every module its class, and all of its settings that are plain data.

    The adapters of peft that are active, merged or switched off are such settings of its layers.
    """
    return [(name, type(module), repr(_plain(vars(module)))) for name, module in model.named_modules()]


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of a module's attributes that are numbers, text, or lists and tables of such; hooks and tensors are not."""
    others = ("_modules", "_parameters", "_buffers", "training")
    return {name: value for name, value in settings.items() if name not in others and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)


def as_compiled(model: Transformer) -> Transformer:
    """The same weights behind a compiled forward. Sizes are dynamic, so all budgets but 1 share a compilation."""
    if model not in _compiled:
        twin = copy.copy(model)  # the modules themselves, so that the network stays as it was
        twin.compile(dynamic=True, mode="reduce-overhead" if model.device.type == "cuda" else None)
        _compiled[model] = twin
    return _compiled[model]
