"""Rows of tensors made in chunks of a fixed size, kept in files that appear whole: shared, killed and continued freely.

A network rounds a little differently in a batch of another size, and one flipped bit makes another sample set. So what
is computed at once is fixed: chunk k holds rows k·size to (k+1)·size − 1, always all of them, whoever computes it.
Batches group chunks into files and nothing else, and processes take turns at batches.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from elit.files import replacing

CHUNK = 32
"""Pictures computed at once unless told otherwise; the number decides roundings."""
Progress = Callable[[int, int], None]


class Share(NamedTuple):
    """One of several processes that share the work."""

    rank: int = 0
    world: int = 1
    wait: Callable[[], object] = lambda: None
    """Returns when all processes have called it."""

    @property
    def main(self) -> bool:
        return self.rank == 0


class Work(TypedDict, total=False):
    """Options of everything that works chunk by chunk."""

    batch_size: int
    """Pictures of a file, default 256, rounded up to whole chunks; changes no number."""
    share: Share
    """Default: one process does everything."""
    progress: Progress | None
    """Called with (pictures done, pictures of this process)."""


class Chunks:
    """A folder of files FIRST-STOP.safetensors, each with whole chunks of rows."""

    def __init__(self, folder: Path, size: int):
        self.folder, self.size = folder, size

    def fill(
        self,
        count: int,
        make: Callable[[int], dict[str, Tensor]],
        *,
        batch_size: int = 256,
        share: Share = Share(),  # noqa: B008
        progress: Progress | None = None,
    ) -> None:
        """Makes the missing chunks of the first `count` rows; returns when all processes are through.

        make: first row of a chunk -> its rows, `size` of each tensor. Other arguments as in `Work`.
        """
        starts = range(0, count, self.size)
        fair = -(-len(starts) // share.world)  # a batch must not leave the other processes without work
        in_batch = min(-(-batch_size // self.size), fair)
        batches = [starts[i : i + in_batch] for i in range(0, len(starts), in_batch)][share.rank :: share.world]
        # Listed once: others write meanwhile, but only their own chunks.
        present = self._files()
        done, total = 0, sum(map(len, batches)) * self.size
        for batch in batches:
            chunks: list[tuple[int, dict[str, Tensor]]] = []
            for first in batch:
                if first in present:
                    self._write(chunks)
                    chunks = []
                else:
                    chunks.append((first, make(first)))
                done += self.size
                if progress:
                    progress(done, total)
            self._write(chunks)
        share.wait()

    def read(self, first: int, stop: int, name: str) -> Tensor:
        """Rows of one tensor. Raises ValueError where a chunk is missing or a file is damaged."""
        files, parts = self._files(), []
        for chunk in range(first - first % self.size, stop, self.size):
            if chunk not in files:
                raise ValueError(f"cannot read {str(self.folder)!r}: rows from {chunk} are missing; run it again")
            path, start = files[chunk]
            rows = slice(max(first, chunk) - start, min(chunk + self.size, stop) - start)
            try:
                with safe_open(path, "pt") as file:
                    parts.append(file.get_slice(name)[rows])
            except SafetensorError as error:
                raise ValueError(f"cannot read {str(path)!r}: damaged ({error}); remove it and run it again") from None
        return torch.cat(parts)

    def stream(self, count: int, name: str) -> Iterator[Tensor]:
        """The first `count` rows of one tensor, chunk by chunk in order."""
        for first in range(0, count, self.size):
            yield self.read(first, min(first + self.size, count), name)

    def names(self) -> set[str]:
        """Tensors in the files; all files have the same."""
        path, _ = next(iter(self._files().values()))
        with safe_open(path, "pt") as file:
            return set(file.keys())

    def _files(self) -> dict[int, tuple[Path, int]]:
        """The file of each chunk, by the chunk's first row, and the file's first row."""
        files = {}
        for path in sorted(self.folder.glob("[0-9]*-[0-9]*.safetensors")):
            start, stop = map(int, path.stem.split("-"))
            files.update(dict.fromkeys(range(start, stop, self.size), (path, start)))
        return files

    def _write(self, chunks: list[tuple[int, dict[str, Tensor]]]) -> None:
        if not chunks:
            return
        start, stop = chunks[0][0], chunks[-1][0] + self.size
        rows = {name: torch.cat([part[name] for _, part in chunks]) for name in chunks[0][1]}
        with replacing(self.folder / f"{start:08d}-{stop:08d}.safetensors") as temporary:
            save_file(rows, temporary)
