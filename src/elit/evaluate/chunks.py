"""Rows of tensors made in chunks of a fixed size, kept in files that appear whole: shared, killed and continued freely.

A network rounds a little differently in a batch of another size, and one flipped bit makes another sample set. So what
is computed at once is fixed: chunk k holds rows k·size to (k+1)·size − 1, always all of them, whoever computes it.
Batches group chunks into files and nothing else, and processes take turns at batches.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from elit.files import replacing

Progress = Callable[[int, int], None]


class Share(NamedTuple):
    """Which of how many processes this is, and how it waits for the others."""

    rank: int = 0
    world: int = 1
    wait: Callable[[], object] = lambda: None

    @property
    def main(self) -> bool:
        return self.rank == 0


class Chunks:
    """A folder of files FIRST-STOP.safetensors, each with whole chunks of rows."""

    def __init__(self, folder: Path, size: int):
        if size < 1:
            raise ValueError(f"chunk={size}: give at least 1")
        self.folder, self.size = folder, size

    def fill(
        self,
        count: int,
        make: Callable[[int], dict[str, Tensor]],
        *,
        batch_size: int,
        share: Share,
        progress: Progress | None = None,
    ) -> None:
        """Makes the chunks that the first `count` rows need and that are not there yet.

        make: first row of a chunk -> its rows, `size` of each tensor. batch_size: rows of a file, rounded up to whole
        chunks. progress: called with (rows done, rows of this process). Returns when all processes are through.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: give at least 1")
        starts = range(0, count, self.size)
        fair = -(-len(starts) // share.world)  # a batch must not leave the other processes without work
        in_batch = min(-(-batch_size // self.size), fair)
        batches = [starts[i : i + in_batch] for i in range(0, len(starts), in_batch)][share.rank :: share.world]
        # Listed once: others write meanwhile, but only what is theirs.
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
                raise ValueError(f"{str(self.folder)!r}: rows from {chunk} are missing; run the command again")
            path, start = files[chunk]
            rows = slice(max(first, chunk) - start, min(chunk + self.size, stop) - start)
            try:
                with safe_open(path, "pt") as file:
                    parts.append(file.get_slice(name)[rows])
            except SafetensorError as error:
                raise ValueError(f"{str(path)!r} is damaged ({error}); remove it and run the command again") from None
        return torch.cat(parts)

    def stream(self, count: int, name: str) -> Iterator[Tensor]:
        """The first `count` rows of one tensor, chunk by chunk in order."""
        for first in range(0, count, self.size):
            yield self.read(first, min(first + self.size, count), name)

    def names(self) -> set[str]:
        """The tensors that are here; all files have the same."""
        path, _ = next(iter(self._files().values()))
        with safe_open(path, "pt") as file:
            return set(file.keys())

    def _files(self) -> dict[int, tuple[Path, int]]:
        """Where each chunk is, by its first row: the file, and the file's first row."""
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
