"""What a pipeline hands to its transformer, and what comes back: recorded while the pipeline itself runs.

So nobody here repeats a pipeline: its text encoders, schedulers, guidance embeddings and both branches of guidance are
as they are in use. Prompts are encoded first, all of them, and kept on disk; then the encoders can go.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from elit.compat import execution_device
from elit.elastic.context import current_branch
from elit.elastic.runtime import original
from elit.files import replacing

Arguments = dict[str, Any]


class _Stop(Exception):
    """A pipeline has come to its transformer, and that is as far as it was to go."""


def first_call(pipe: Any, request: Mapping[str, Any]) -> Arguments:
    """The arguments of the transformer's first forward when `pipe` is called with `request`; it does not run."""
    calls: list[Arguments] = []

    def stop(module: Any, args: Any, kwargs: Any) -> None:
        calls.append(bound(module, args, kwargs))
        raise _Stop

    handle = pipe.transformer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            pipe(**request)
    except _Stop:
        return calls[0]
    finally:
        handle.remove()
    raise ValueError(f"pipeline: a {type(pipe).__name__} that did not call its transformer")


def record(pipe: Any, request: Mapping[str, Any]) -> dict[str, list[tuple[Arguments, Tensor]]]:
    """Runs `pipe` as the original; (arguments, output) of each forward of its transformer, by branch of guidance."""
    calls: dict[str, list[tuple[Arguments, Tensor]]] = {}

    def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        calls.setdefault(current_branch() or "all", []).append((bound(module, args, kwargs), output_tensor(output)))

    handle = pipe.transformer.register_forward_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad(), original():
            pipe(**request)
    finally:
        handle.remove()
    return calls


def bound(module: Any, args: Any, kwargs: Any) -> Arguments:
    """A forward's arguments by name, those of dictionaries among them as "name.key"."""
    return dict(_flat(inspect.signature(module.forward).bind(*args, **kwargs).arguments))


def _flat(arguments: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in arguments.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def nested(arguments: Arguments) -> Arguments:
    """What `bound` has laid flat."""
    result: Arguments = {}
    for name, value in arguments.items():
        *outer, last = name.split(".")
        place = result
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = value
    return result


def arguments_by_row(one: Arguments, two: Arguments, sample: str) -> frozenset[str]:
    """Which arguments have an entry a sample, told from a call for one prompt and a call for two."""
    rows = len(one[sample]), len(two[sample])
    return frozenset(
        name
        for name, value in one.items()
        if isinstance(value, Tensor | list | tuple)
        and (not isinstance(value, Tensor) or value.ndim)
        and (len(value), len(two[name])) == rows
    )


def output_tensor(output: Any) -> Tensor:
    """What a transformer predicts, of what its forward returns."""
    return output if isinstance(output, Tensor) else output[0]


# --- Prompts, encoded once -------------------------------------------------------------------------------------------


@contextmanager
def encoded_prompts(pipe: Any, folder: Path) -> Iterator[None]:
    """Inside the block `pipe.encode_prompt` computes what it is asked once, and reads it from `folder` afterwards."""
    encode: Callable[..., Any] = pipe.encode_prompt

    def cached(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(encode).bind(*args, **kwargs).arguments
        plain = {name: value for name, value in bound.items() if not isinstance(value, torch.device)}
        if any(isinstance(value, Tensor) for value in plain.values()):
            return encode(*args, **kwargs)
        key = hashlib.sha256(repr(sorted(plain.items())).encode()).hexdigest()[:24]
        path = folder / f"{key}.safetensors"
        if not path.is_file():
            parts = encode(*args, **kwargs)
            tensors = {str(i): part.contiguous().cpu() for i, part in enumerate(parts) if isinstance(part, Tensor)}
            write_tensors(tensors, path, {"parts": str(len(parts))})
        with safe_open(path, "pt") as file:
            count = int(file.metadata()["parts"])
            names = set(file.keys())
            device = execution_device(pipe)
            return tuple(file.get_tensor(str(i)).to(device) if str(i) in names else None for i in range(count))

    own = vars(pipe).get("encode_prompt")
    pipe.encode_prompt = cached
    try:
        yield
    finally:
        del pipe.encode_prompt
        if own is not None:
            pipe.encode_prompt = own


def free_text_encoders(pipe: Any) -> None:
    """Drops the pipeline's text encoders; what `encoded_prompts` has on disk stands in for them."""
    for name in list(pipe.components):
        if name.startswith("text_encoder"):
            setattr(pipe, name, None)


def write_tensors(tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str]) -> None:
    """A safetensors file, whole or not at all. Raises OSError where it cannot be written."""
    with replacing(path, concurrent=True) as temporary:
        try:
            plain = {name: value.detach().contiguous().cpu() for name, value in tensors.items()}
            save_file(plain, temporary, dict(about))
        except SafetensorError as error:
            raise OSError(f"{str(path)!r}: cannot be written ({error}); make room, or give another folder") from None
