"""Networks in another dtype, and compiled ones."""

import copy
import json
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
    """A dtype from its name, such as "bfloat16"; others as they are."""
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def in_dtype(model: Transformer, dtype: torch.dtype) -> Transformer:
    """A copy in `dtype`, kept as long as `model` lives and is built as it was; its weights are those of now.

    They are copied anew each time: a write through `.data`, as when peft merges an adapter, leaves no trace.
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


def _structure(model: Transformer) -> str:
    """Of every module its class and its settings beside the weights, such as peft's adapters: active, merged or off."""
    others = ("_modules", "_parameters", "_buffers", "training")
    settings = [
        (type(module).__name__, {name: value for name, value in vars(module).items() if name not in others})
        for module in model.modules()
    ]
    return json.dumps(settings, skipkeys=True, default=lambda value: type(value).__name__)


def as_compiled(model: Transformer) -> Transformer:
    """A twin with the same weights and a compiled forward; sizes are dynamic, so all budgets but 1 share a graph."""
    if model not in _compiled:
        twin = copy.copy(model)  # the modules themselves, so that the network stays as it was
        twin.compile(dynamic=True, mode="reduce-overhead" if model.device.type == "cuda" else None)
        _compiled[model] = twin
    return _compiled[model]
