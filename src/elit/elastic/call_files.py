"""Recorded calls of a transformer on disk, and as a data set that training reads.

A file holds the S calls that one branch of guidance made for B samples; what does not change from call to call is in it
once. Its tensors are step/NAME (S, B, ...), row/NAME (B, ...) and shared/NAME (...); what is no tensor is in its
metadata. Calls whose tensors have the same shapes and whose other arguments agree are of one kind: their rows can be in
one batch. A kind is a bucket: a picture size, and where the length of the text shows, that too.
"""

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from elit.elastic.recording import Arguments, nested, write_tensors

OUTPUT = "output"


TIMES = ("timestep", "t")
"""Names of the argument that says the time."""


def save_calls(path: Path, calls: Sequence[tuple[Arguments, Tensor]], by_row: frozenset[str]) -> None:
    """Writes the calls of one branch, (arguments, output). by_row: the arguments with an entry a sample.

    Arguments may be lists with a tensor a sample (Z-Image); samples whose tensors have other shapes are in files of
    their own, NAME.1.safetensors and so on. Raises ValueError for an argument that cannot be divided into samples,
    OSError without room.
    """
    arguments, output = calls[0]
    listed = sorted(name for name in by_row if is_list_of_tensors(arguments[name]))
    alike: dict[Any, list[int]] = {}
    for row in range(len(output)):
        alike.setdefault(tuple(arguments[name][row].shape for name in listed), []).append(row)
    for number, rows in enumerate(alike.values()):
        part = [
            ({name: _rows(each, rows) if name in by_row else each for name, each in call.items()}, out[rows])
            for call, out in calls
        ]
        about = {"listed": listed, "places": rows}
        _save_alike(path.with_suffix(f".{number}.safetensors") if number else path, part, by_row, about)


def is_list_of_tensors(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, Tensor) for each in value)


def _rows(value: Any, rows: list[int]) -> Any:
    """Those of a tensor; a list of tensors of one shape as a tensor."""
    if isinstance(value, Tensor):
        return value[rows]
    values = [value[row] for row in rows]
    return torch.stack(values) if is_list_of_tensors(values) else values


def _save_alike(
    path: Path, calls: Sequence[tuple[Arguments, Tensor]], by_row: frozenset[str], about: dict[str, Any]
) -> None:
    tensors: dict[str, Tensor] = {f"step/{OUTPUT}": torch.stack([output for _, output in calls])}
    constants: dict[str, Any] = {}
    repeated, rows = [], len(calls[0][1])
    for name, value in calls[0][0].items():
        if isinstance(value, Tensor):
            values = [arguments[name] for arguments, _ in calls]
            changes = any(each is not value and not torch.equal(each, value) for each in values[1:])
            if changes or name in TIMES:
                if name not in by_row and value.numel() > 1 and name not in TIMES:
                    raise ValueError(f"{name}: differs from step to step without an entry a sample; not supported")
                if name not in by_row or name in TIMES:  # one for all samples, or one each
                    values = [each.reshape(-1).expand(rows) for each in values]
                tensors[f"step/{name}"] = torch.stack(values)
            else:
                tensors[f"{'row' if name in by_row else 'shared'}/{name}"] = value
        elif name in by_row and value:
            if any(each != value[0] for each in value):
                raise ValueError(f"{name}: differs from sample to sample without being a tensor; not supported")
            constants[name] = value[0]
            repeated.append(name)
        else:
            constants[name] = value
    about |= {"constants": constants, "repeated": repeated}
    write_tensors(tensors, path, {name: repr(value) for name, value in about.items()})


class CallFile:
    """A file of `save_calls`, mapped into memory. Raises ValueError where it is damaged."""

    def __init__(self, path: Path):
        try:
            self.file = safe_open(path, "pt")
            about = self.file.metadata()
            self.constants = ast.literal_eval(about["constants"])
            self.repeated: list[str] = ast.literal_eval(about["repeated"])
            self.listed: list[str] = ast.literal_eval(about["listed"])
            self.places: list[int] = ast.literal_eval(about["places"])
            """Of its rows in the batch that was saved."""
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, SyntaxError) as error:
            raise ValueError(f"cache: {str(path)!r} is damaged ({error}); remove it and run again") from None
        self.names = sorted(self.file.keys())
        shapes = {name: tuple(self.file.get_slice(name).get_shape()) for name in self.names}
        self.steps, self.rows = shapes[f"step/{OUTPUT}"][:2]
        axes = {"step": 2, "row": 1, "shared": 0}
        inner = sorted((name, shape[axes[name.partition("/")[0]] :]) for name, shape in shapes.items())
        self.kind = repr((inner, sorted(self.constants.items()), self.repeated, self.listed))

    def row(self, step: int, row: int) -> dict[str, Tensor]:
        """One sample of one call: tensors by argument, without a batch axis; those of all samples as they are."""
        read = {}
        for name in self.names:
            place, _, argument = name.partition("/")
            if place == "shared":
                read[argument] = self.file.get_tensor(name)
            else:
                read[argument] = self.file.get_slice(name)[(step, row) if place == "step" else (row,)]
        return read

    @property
    def shared(self) -> set[str]:
        return {name.partition("/")[2] for name in self.names if name.startswith("shared/")}


@dataclass
class CallBatch:
    """The arguments of a forward for a batch."""

    arguments: Arguments

    def to(self, device: torch.device, non_blocking: bool = False) -> "CallBatch":
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "CallBatch":
        return self.map(Tensor.pin_memory)

    def map(self, change: Callable[[Tensor], Tensor]) -> "CallBatch":
        """With every tensor changed."""
        changed = dict(self.arguments)
        for name, value in changed.items():
            if isinstance(value, Tensor):
                changed[name] = change(value)
            elif is_list_of_tensors(value):
                changed[name] = [change(each) for each in value]
        return CallBatch(changed)

    def nested(self) -> Arguments:
        """As a forward takes them."""
        return nested(self.arguments)


class RecordedCalls:
    """All calls in a folder, one entry a sample, call and branch. Raises ValueError where there are none."""

    def __init__(self, folder: Path):
        self.files = [CallFile(path) for path in sorted(folder.glob("*.safetensors"))]
        if not self.files:
            raise ValueError(f"cache: {str(folder)!r} holds no recorded calls; run the command again")
        counts = [file.steps * file.rows for file in self.files]
        self.first = np.concatenate(([0], np.cumsum(counts)))
        kinds: dict[str, list[np.ndarray]] = {}
        for number, file in enumerate(self.files):
            kinds.setdefault(file.kind, []).append(np.arange(self.first[number], self.first[number + 1]))
        self.buckets = [np.concatenate(kinds[kind]) for kind in sorted(kinds)]
        """Entries that can be in one batch."""

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, CallBatch]:
        """Outputs (B, ...) and the calls' arguments; indices: of one bucket."""
        numbers = np.searchsorted(self.first, indices, side="right") - 1
        places = []
        for number, index in zip(numbers.tolist(), indices, strict=True):
            file = self.files[number]
            places.append((file, *divmod(int(index - self.first[number]), file.rows)))
        return batch_of_rows(places)


def batch_of_rows(places: Sequence[tuple[CallFile, int, int]]) -> tuple[Tensor, CallBatch]:
    """Outputs (B, ...) and arguments of the calls at (file, step, row), all of one kind."""
    rows = [file.row(step, row) for file, step, row in places]
    file = places[0][0]
    arguments: Arguments = {
        name: [value] * len(rows) if name in file.repeated else value for name, value in file.constants.items()
    }
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name in file.listed:
            arguments[name] = values
        else:
            arguments[name] = values[0] if name in file.shared else torch.stack(values)
    return arguments.pop(OUTPUT), CallBatch(arguments)
