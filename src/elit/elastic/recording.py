"""The calls that a pipeline makes of its transformer, recorded while the pipeline itself runs.

So nobody here repeats a pipeline: its text encoders, schedulers, guidance embeddings and both branches of guidance are
as they are in use. Prompts are encoded first, all of them, and kept on disk; then the encoders can go.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from elit.compat import execution_device
from elit.elastic.context import current_branch, original
from elit.elastic.families import family_of
from elit.elastic.families.family import Model, Pipeline
from elit.elastic.trees import Arguments, Tree, map_tensors, read_tree, write_tree

TIMES = ("timestep", "t")
"""Names of the argument that holds the time."""


class _Stop(Exception):
    """A pipeline has come to its transformer, and that is as far as it was to go."""


def first_call(pipe: Pipeline, request: Arguments) -> Arguments:
    """The arguments of the transformer's first forward when `pipe` is called with `request`; it does not run."""
    calls: list[Arguments] = []

    def stop(module: Model, args: Tree, kwargs: Tree) -> None:
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
    raise ValueError(f"cannot distil a {type(pipe).__name__}: it did not call its transformer")


def record(pipe: Pipeline, request: Arguments) -> list[tuple[str, Arguments, Tensor]]:
    """Runs `pipe` as the original; (branch of guidance, arguments, output) of each forward of its transformer."""
    calls: list[tuple[str, Arguments, Tensor]] = []

    def keep(module: Model, args: Tree, kwargs: Tree, output: Tree) -> None:
        calls.append((current_branch() or "all", bound(module, args, kwargs), output_tensor(output)))

    handle = pipe.transformer.register_forward_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad(), original():
            pipe(**request)
    finally:
        handle.remove()
    return calls


def bound(module: Model, args: Tree, kwargs: Tree) -> Arguments:
    """A forward's arguments by name; a time that is one for all samples as one each."""
    arguments = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
    rows = len(arguments[family_of(module).sample])
    for name in TIMES:
        if isinstance(time := arguments.get(name), Tensor) and time.numel() == 1:
            arguments[name] = time.reshape(-1).expand(rows)
    return arguments


def output_tensor(output: Tree) -> Tensor:
    """The prediction in what a transformer's forward returns; a list with one tensor a sample as one tensor."""
    first = output if isinstance(output, Tensor) else output[0]
    return torch.stack(first) if isinstance(first, list) else first


@contextmanager
def encoded_prompts(pipe: Pipeline, folder: Path) -> Iterator[None]:
    """Inside the block `pipe.encode_prompt` encodes each prompt once, and reads it from `folder` afterwards."""
    encode: Callable[..., Tree] | None = getattr(pipe, "encode_prompt", None)
    if encode is None:  # a pipeline of classes
        yield
        return
    own = vars(pipe).get("encode_prompt")

    def cached(*args: Tree, **kwargs: Tree) -> Tree:
        given = inspect.signature(encode).bind(*args, **kwargs).arguments
        plain = {name: value for name, value in given.items() if not isinstance(value, torch.device)}
        if any(isinstance(value, Tensor) for value in plain.values()):
            return encode(*args, **kwargs)
        path = folder / f"{hashlib.sha256(repr(sorted(plain.items())).encode()).hexdigest()[:24]}.pt"
        if not path.is_file():
            write_tree(encode(*args, **kwargs), path)
        device = execution_device(pipe)
        return map_tensors(lambda value: value.to(device, copy=True), read_tree(path))

    pipe.encode_prompt = cached
    try:
        yield
    finally:
        if own is None:
            del pipe.encode_prompt
        else:
            pipe.encode_prompt = own


def free_text_encoders(pipe: Pipeline) -> None:
    """Lets the text encoders go; what `encoded_prompts` has on disk stands in for them."""
    for name in list(pipe.components):
        if name.startswith("text_encoder"):
            setattr(pipe, name, None)
