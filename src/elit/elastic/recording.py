"""What a pipeline hands to its transformer, and what comes back: recorded while the pipeline itself runs.

So nobody here repeats a pipeline: its text encoders, schedulers, guidance embeddings and both branches of guidance are
as they are in use. Prompts are encoded first, all of them, and kept on disk; then the encoders can go.
"""

import ast
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """A forward's arguments by name, those of dictionaries and tuples of tensors among them as "name.key"."""
    return dict(_flat(inspect.signature(module.forward).bind(*args, **kwargs).arguments))


def _flat(arguments: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in arguments.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, tuple) and value and all(isinstance(part, Tensor) for part in value):
            yield from ((f"{prefix}{name}.{i}", part) for i, part in enumerate(value))
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
    return {name: _tuples(value) for name, value in result.items()}


def _tuples(value: Any) -> Any:
    """Dictionaries with numbers as keys were tuples."""
    if not isinstance(value, dict):
        return value
    parts = {name: _tuples(each) for name, each in value.items()}
    return tuple(parts.values()) if parts and all(name.isdigit() for name in parts) else parts


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
    """What a transformer predicts, of what its forward returns; a list with one tensor a sample as one."""
    first = output if isinstance(output, Tensor) else output[0]
    return torch.stack(first) if isinstance(first, list) else first


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
            lengths = [len(part) if isinstance(part, list) else None for part in parts]
            tensors = dict(_named(parts))
            write_tensors(tensors, path, {"lengths": repr(lengths)})
        with safe_open(path, "pt") as file:
            lengths = ast.literal_eval(file.metadata()["lengths"])
            device = execution_device(pipe)
            tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
            return tuple(
                tensors.get(str(i)) if length is None else [tensors[f"{i}.{row}"] for row in range(length)]
                for i, length in enumerate(lengths)
            )

    own = vars(pipe).get("encode_prompt")
    pipe.encode_prompt = cached
    try:
        yield
    finally:
        del pipe.encode_prompt
        if own is not None:
            pipe.encode_prompt = own


def _named(parts: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of what `encode_prompt` returns, and of lists in it, which have one a prompt."""
    for i, part in enumerate(parts):
        if isinstance(part, Tensor):
            yield str(i), part
        elif isinstance(part, list):
            yield from ((f"{i}.{row}", each) for row, each in enumerate(part))


def free_text_encoders(pipe: Any) -> None:
    """Drops the pipeline's text encoders; what `encoded_prompts` has on disk stands in for them."""
    for name in list(pipe.components):
        if name.startswith("text_encoder"):
            setattr(pipe, name, None)


def write_tensors(tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str]) -> None:
    """A safetensors file, whole or not at all. Raises OSError where it cannot be written."""
    with replacing(path) as temporary:
        try:
            plain = {name: value.detach().contiguous().cpu() for name, value in tensors.items()}
            places: set[int] = set()
            for name, value in plain.items():
                if value.data_ptr() in places:  # safetensors refuses one tensor under two names
                    plain[name] = value.clone()
                places.add(value.data_ptr())
            save_file(plain, temporary, dict(about))
        except SafetensorError as error:
            raise OSError(f"{str(path)!r}: cannot be written ({error}); make room, or give another folder") from None
