"""The calls that a pipeline makes of its transformer, recorded while the pipeline itself runs.

So nobody here repeats a pipeline: its text encoders, schedulers, guidance embeddings and both branches of guidance are
as they are in use. Prompts are encoded first, all of them, and kept on disk; then the encoders can go.
"""

import hashlib
import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from elit.compat import execution_device
from elit.elastic.context import current_branch, original
from elit.elastic.families import family_of
from elit.elastic.families.family import Model, Pipeline
from elit.elastic.trees import Arguments, Tree, join_rows, map_tensors, map_tree, read_tree, take_rows, write_tree

TIMES = ("timestep", "t")
"""Names of the argument that holds the time."""


class _Stop(Exception):
    """A pipeline has come to its transformer, and that is as far as it was to go."""


def first_call(pipe: Pipeline, request: Arguments) -> Arguments:
    """The arguments of the transformer's first forward when `pipe` is called with `request`; it does not run."""
    calls = record(pipe, request, run=False)
    if not calls:
        raise ValueError(f"cannot distil a {type(pipe).__name__}: it did not call its transformer")
    return calls[0][1]


def record(pipe: Pipeline, request: Arguments, *, run: bool = True) -> list[tuple[str, Arguments, Tensor]]:
    """Runs `pipe` as the original; (branch of guidance, arguments, output) of each forward of its transformer.

    run: or else it stops before the first forward.
    """
    calls: list[tuple[str, Arguments, Tensor]] = []

    def keep(module: Model, args: Tree, kwargs: Tree, output: Tree = ()) -> None:
        predicted = output_tensor(output) if run else torch.empty(0)
        calls.append((current_branch() or "all", bound(module, args, kwargs), predicted))
        if not run:
            raise _Stop

    register = pipe.transformer.register_forward_hook if run else pipe.transformer.register_forward_pre_hook
    handle = register(keep, with_kwargs=True)
    try:
        with torch.no_grad(), original(), suppress(_Stop):
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
    """Lets `pipe.encode_prompt` encode each prompt once inside the block, and read it from `folder` afterwards."""
    encode: Callable[..., Tree] | None = getattr(pipe, "encode_prompt", None)
    if encode is None:  # a pipeline of classes
        yield
        return

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
        pipe.encode_prompt = encode


def free_text_encoders(pipe: Pipeline) -> None:
    """Lets the text encoders go; what `encoded_prompts` has on disk stands in for them."""
    for name in list(pipe.components):
        if name.startswith("text_encoder"):
            setattr(pipe, name, None)


@dataclass
class CallBatch:
    """The arguments of a forward for a batch."""

    arguments: Arguments

    def to(self, device: torch.device, non_blocking: bool = False) -> "CallBatch":
        return CallBatch(map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking), self.arguments))

    def pin_memory(self) -> "CallBatch":
        return CallBatch(map_tensors(Tensor.pin_memory, self.arguments))


def save_calls(path: Path, calls: Sequence[tuple[str, Arguments, Tensor]], layout: Tree) -> None:
    """Writes (branch, arguments, output) of each call, and once what does not change from call to call.

    Raises OSError without room.
    """
    before: dict[str, Arguments] = {}
    stored, kinds = [], []
    for branch, arguments, output in sorted(calls, key=lambda call: call[0]):
        plain = map_tensors(lambda value: value.detach().cpu().clone(), arguments)
        before[branch] = plain = map_tree(_unchanged, plain, before.get(branch, plain))
        stored.append((plain, output.detach().cpu().clone()))
        kinds.append(kinds_of(layout, plain, len(output)))
    write_tree({"layout": layout, "calls": stored, "kinds": kinds}, path)


def _unchanged(value: Tree, before: Tree) -> Tree:
    """The tensor of the call before where it is equal."""
    tensors = isinstance(value, Tensor) and isinstance(before, Tensor) and value.dtype == before.dtype
    return before if tensors and torch.equal(value, before) else value


def kinds_of(layout: Tree, arguments: Arguments, rows: int) -> list[str]:
    """The kind of each row: a digest of all that it shares, and of the shapes of what is its own."""

    def shape(value: Tree) -> str:
        return f"{value.dtype}{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)

    def content(value: Tensor) -> str:
        data = value.reshape(-1).contiguous().view(torch.uint8).numpy()
        return f"{shape(value)}{hashlib.sha256(data.tobytes()).hexdigest()}"

    def own(row: int) -> Tree:
        return map_tree(lambda mine, value: map_tree(shape, value[row]) if mine else None, layout, arguments)

    shared = map_tree(lambda mine, value: None if mine else map_tensors(content, value), layout, arguments)
    return [hashlib.sha256(repr((shared, own(row))).encode()).hexdigest()[:16] for row in range(rows)]


@lru_cache(maxsize=1024)
def _read(path: Path) -> dict[str, Tree]:
    return read_tree(path)


class RecordedCalls:
    """The calls in some files, one entry a call and sample. Raises ValueError where there are none."""

    def __init__(self, folder: Path):
        self.paths = sorted(folder.glob("*.pt"))
        entries, kinds = [], []
        for number, path in enumerate(self.paths):
            for call, rows in enumerate(_read(path)["kinds"]):
                entries += [(number, call, row) for row in range(len(rows))]
                kinds += rows
        if not entries:
            raise ValueError(f"cannot read {str(folder)!r}: no recorded calls; run the command again")
        self.entries = np.array(entries)
        self.kinds = kinds
        self.buckets = buckets_of(kinds)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, CallBatch]:
        """Outputs (B, ...) and the calls' arguments; indices: of one bucket."""
        outputs, trees = [], []
        for file, call, row in self.entries[list(indices)].tolist():
            content = _read(self.paths[file])
            arguments, output = content["calls"][call]
            trees.append(take_rows(content["layout"], arguments, slice(row, row + 1)))
            outputs.append(output[row : row + 1])
        return torch.cat(outputs), CallBatch(join_rows(content["layout"], trees))


def buckets_of(kinds: Sequence[Hashable]) -> list[np.ndarray]:
    """Entries that can be in one batch, by their kind."""
    buckets: dict[Hashable, list[int]] = {}
    for entry, kind in enumerate(kinds):
        buckets.setdefault(kind, []).append(entry)
    return [np.array(bucket) for bucket in buckets.values()]
