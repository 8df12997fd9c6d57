"""Recorded calls of a transformer on disk, and as a data set that training reads.

A file holds the S calls that one branch of guidance made for B samples; what does not change from call to call is in it
once. Its tensors are step/NAME (S, B, ...), row/NAME (B, ...) and shared/NAME (...); what is no tensor is in its
metadata. Calls whose tensors have the same shapes and whose other arguments agree are of one kind: their rows can be in
one batch. A kind is a bucket: a picture size, and where the length of the text shows, that too.
"""

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from elit.elastic.recording import Arguments, nested, write_tensors

OUTPUT = "output"


def save_calls(path: Path, calls: Sequence[tuple[Arguments, Tensor]], by_row: frozenset[str]) -> None:
    """Writes the calls of one branch, (arguments, output). by_row: the arguments with an entry a sample.

    Raises ValueError for an argument that is no tensor and differs from sample to sample, OSError without room.
    """
    tensors: dict[str, Tensor] = {f"step/{OUTPUT}": torch.stack([output for _, output in calls])}
    constants: dict[str, Any] = {}
    repeated, rows = [], len(calls[0][1])
    for name, value in calls[0][0].items():
        if isinstance(value, Tensor):
            values = [arguments[name] for arguments, _ in calls]
            if name == "timestep":  # one for all samples, or one each
                tensors[f"step/{name}"] = torch.stack([each.reshape(-1).expand(rows) for each in values])
            elif any(each is not value and not torch.equal(each, value) for each in values[1:]):
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
    write_tensors(tensors, path, {"constants": repr(constants), "repeated": repr(repeated)})


class CallFile:
    """A file of `save_calls`, mapped into memory. Raises ValueError where it is damaged."""

    def __init__(self, path: Path):
        try:
            self.file = safe_open(path, "pt")
            about = self.file.metadata()
            self.constants = ast.literal_eval(about["constants"])
            self.repeated: list[str] = ast.literal_eval(about["repeated"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, SyntaxError) as error:
            raise ValueError(f"cache: {str(path)!r} is damaged ({error}); remove it and run again") from None
        self.names = sorted(self.file.keys())
        shapes = {name: tuple(self.file.get_slice(name).get_shape()) for name in self.names}
        self.steps, self.rows = shapes[f"step/{OUTPUT}"][:2]
        axes = {"step": 2, "row": 1, "shared": 0}
        inner = sorted((name, shape[axes[name.partition("/")[0]] :]) for name, shape in shapes.items())
        self.kind = repr((inner, sorted(self.constants.items()), self.repeated))

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
        moved = {
            name: value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value
            for name, value in self.arguments.items()
        }
        return CallBatch(moved)

    def pin_memory(self) -> "CallBatch":
        pinned = {n: value.pin_memory() if isinstance(value, Tensor) else value for n, value in self.arguments.items()}
        return CallBatch(pinned)

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
        rows = []
        for number, index in zip(numbers.tolist(), indices, strict=True):
            place = int(index - self.first[number])
            rows.append(self.files[number].row(*divmod(place, self.files[number].rows)))
        file = self.files[int(numbers[0])]
        arguments: Arguments = {
            name: [value] * len(rows) if name in file.repeated else value for name, value in file.constants.items()
        }
        for name in rows[0]:
            arguments[name] = rows[0][name] if name in file.shared else torch.stack([row[name] for row in rows])
        return arguments.pop(OUTPUT), CallBatch(arguments)
