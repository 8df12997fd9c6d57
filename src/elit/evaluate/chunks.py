"""Recipes of numbers, and tensors made in chunks of a fixed size (a batch's size changes roundings), kept in files."""

import hashlib
import json
import platform
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from elit._version import __version__
from elit.files import Json, replacing, write_text
from elit.models.conditioning import Condition
from elit.models.saved import weights_digest
from elit.models.transformer import Transformer
from elit.sampling.autoencoders import latent_normalization

if TYPE_CHECKING:
    from accelerate import PartialState

PACKAGES = ("torch", "diffusers", "transformers", "torch-fidelity")
Recipe = Json
CHUNK = 32  # pictures computed at once unless told otherwise
Progress = Callable[[int, int], None]  # called with (pictures done, pictures of this process)


def recipe_digest(recipe: Recipe) -> str:
    """SHA-256 of a recipe, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, allow_nan=False).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of the installed packages that numbers may depend on."""
    numbers = {"elit": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):  # an extra that this score did without
            numbers[name] = metadata.version(name)
    return numbers


def describe_network(model: Transformer) -> Recipe:
    """Class, settings and weights."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return {"class": type(model).__name__, "config": config, "weights": weights_digest(model)}


def describe_run(model: Transformer, vae: ModelMixin | None) -> Recipe:
    """Network and autoencoder, and the hardware and versions as far as rounding depends on them."""
    device = model.device
    hardware = {"cpu": f"cpu {torch.backends.cpu.get_cpu_capability()}"}.get(device.type, device.type)
    autoencoder = None
    if vae is not None:
        kind = {"class": type(vae).__name__, "weights": weights_digest(vae)}
        dtype = str(vae.dtype).removeprefix("torch.")
        autoencoder = kind | {"dtype": dtype} | latent_normalization(vae).to_json()
    return {
        "model": describe_network(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else hardware,
        "autoencoder": autoencoder,
        "versions": versions(),
    }


def conditions_digest(conditions: Condition) -> str:
    """SHA-256 of labels or encoded prompts."""
    parts = [conditions] if isinstance(conditions, Tensor) else list(vars(conditions).values())
    total = hashlib.sha256()
    for part in parts:
        total.update(b"-" if part is None else f"{tuple(part.shape)}".encode() + part.cpu().float().numpy().tobytes())
    return total.hexdigest()


def sample_digests(pictures: Tensor) -> Tensor:
    """(B, 32) uint8: the SHA-256 of each picture's shape and bytes; pictures (B, C, ...) uint8."""
    shape = str(tuple(pictures.shape[1:])).encode()
    rows = [hashlib.sha256(shape + picture.contiguous().numpy().tobytes()).digest() for picture in pictures]
    return torch.tensor([list(row) for row in rows], dtype=torch.uint8)


@dataclass(frozen=True, kw_only=True)
class Work:
    """The place of sample sets, features, references and scores, and how they are made."""

    out: Path
    chunk: int = CHUNK
    """Pictures computed at once, by network, autoencoder and detector; decides roundings, so part of every recipe."""
    batch_size: int = 256  # pictures of a file, rounded up to whole chunks; changes no number
    state: "PartialState | None" = None  # the processes that share the work; None for this one alone

    @property
    def main(self) -> bool:
        return self.state is None or self.state.is_main_process

    @property
    def processes(self) -> int:
        return 1 if self.state is None else self.state.num_processes

    def chunks(self, kind: str, recipe: Recipe, count: int, inside: str = "") -> "Chunks":
        """The rows of a recipe: OUT/KIND/KEY, or a folder `inside` of it, KEY from the recipe's digest."""
        return Chunks(self.out / kind / recipe_digest(recipe)[:16] / inside, recipe["chunk"], count)


class Chunks:
    """The first `count` rows in a folder of files FIRST-STOP.safetensors, each with whole chunks of `size` rows."""

    def __init__(self, folder: Path, size: int, count: int):
        self.folder, self.size, self.count = folder, size, count

    def fill(self, make: Callable[[int], dict[str, Tensor]], work: Work, progress: Progress | None = None) -> None:
        """Makes the missing chunks; make: first row of a chunk -> its rows, `size` of each tensor."""
        starts = range(0, self.count, self.size)
        fair = -(-len(starts) // work.processes)  # a batch must not leave the other processes without work
        in_batch = min(-(-work.batch_size // self.size), fair)
        batches = [starts[i : i + in_batch] for i in range(0, len(starts), in_batch)]
        if work.state is not None:
            batches = batches[work.state.process_index :: work.processes]
        # Listed once: others write meanwhile, but only their own chunks.
        present = self._files()
        done, total = 0, sum(map(len, batches)) * self.size
        for batch in batches:
            # A file holds chunks in a row, so one that is there ends it.
            for is_there, firsts in groupby(batch, present.__contains__):
                chunks: dict[int, dict[str, Tensor]] = {}
                for first in firsts:
                    if not is_there:
                        chunks[first] = make(first)
                    done += self.size
                    if progress:
                        progress(done, total)
                if chunks:
                    rows = {name: torch.cat([part[name] for part in chunks.values()]) for name in chunks[min(chunks)]}
                    path = self.folder / f"{min(chunks):08d}-{max(chunks) + self.size:08d}.safetensors"
                    with replacing(path) as temporary:
                        save_file(rows, temporary)
        if work.state is not None:
            work.state.wait_for_everyone()

    def read(self, name: str, first: int = 0, stop: int | None = None) -> Tensor:
        """Rows of one tensor. Raises ValueError where a chunk is missing or a file is damaged."""
        files, parts, stop = self._files(), [], self.count if stop is None else stop
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

    def stream(self, name: str) -> Iterator[Tensor]:
        """The rows of one tensor, chunk by chunk in order."""
        for first in range(0, self.count, self.size):
            yield self.read(name, first, min(first + self.size, self.count))

    def some(self, name: str, limit: int) -> Tensor:
        """The rows of one tensor, or `limit` of them, evenly spaced."""
        if self.count <= limit:
            return self.read(name)
        rows = torch.arange(limit) * self.count // limit
        parts = enumerate(self.stream(name))
        return torch.cat([part[rows[rows // self.size == number] - number * self.size] for number, part in parts])

    @property
    def digest(self) -> str:
        """SHA-256 of the pictures in their order."""
        return hashlib.sha256(self.read("sha256").numpy().tobytes()).hexdigest()

    def _files(self) -> dict[int, tuple[Path, int]]:
        files = {}
        for path in sorted(self.folder.glob("[0-9]*-[0-9]*.safetensors")):
            start, stop = map(int, path.stem.split("-"))
            files.update(dict.fromkeys(range(start, stop, self.size), (path, start)))
        return files


def keep_recipe(folder: Path, recipe: Recipe, work: Work) -> None:
    """Writes recipe.json beside what it decides."""
    path = folder / "recipe.json"
    if work.main and not path.is_file():
        write_text(path, json.dumps(recipe, indent=2) + "\n")
