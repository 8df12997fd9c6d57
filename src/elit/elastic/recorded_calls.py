"""Recorded calls as a data set that training reads: one file for each call of a pipeline.

A file holds the calls of the transformer for the samples of a batch, branch by branch, step by step. Rows of calls are
of one kind, and can be in one batch, where their tensors have the same shapes and all that samples share is equal. A
kind is a bucket: a picture size, and where the length of the text shows, that too.
"""

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from elit.elastic.trees import Arguments, Tree, join_rows, map_tensors, map_tree, read_tree, take_rows, write_tree


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
