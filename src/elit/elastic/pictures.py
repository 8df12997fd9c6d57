"""Pictures with captions or classes, as distillation trains on them: encoded once by the pipeline's own parts.

    CACHE/latents-1024x1024/     what `elit encode` writes: the pictures that go to a size
    CACHE/captions-1024x1024/    the arguments of the transformer's call that their captions make

A call's arguments are recorded from the pipeline, as in `recording.py`; all but the noisy sample and the time, which
training draws.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elit.config import DistillConfig
from elit.data.encode import Encoding, encode, finish, prepare
from elit.data.latents import LatentSet
from elit.data.source import Source, Subset, open_source
from elit.elastic.call_files import CallBatch, CallFile, batch_of_rows, save_calls
from elit.elastic.families.family import Family
from elit.elastic.pipelines import Requests
from elit.elastic.recording import Arguments, first_call
from elit.files import write_text
from elit.models.saved import weights_digest
from elit.sampling.autoencoders import downsampling

Size = tuple[int, int]


class Pictures:
    """The pictures that `config.data` names, by the size that each goes to.

    Raises ValueError where there are none, or nothing of this pipeline's class can be trained on them.
    """

    def __init__(self, config: DistillConfig):
        self.config = config
        assert config.data is not None
        self.root = Path(config.data)
        self.encoded = (self.root / "encode.json").is_file()
        self.source: Source | LatentSet | None = None

    def open(self, pipe: Any, family: Family) -> None:
        """Checks what can be checked before anything is written."""
        self.pipe, self.family = pipe, family
        kind = type(pipe).__name__
        if family.pack is None:
            raise ValueError(f"data: pictures are not all that a {kind} draws; distil it with prompts")
        if getattr(pipe, "vae", None) is None:
            raise ValueError(f"data: this {kind} has no vae to encode pictures with; distil it with prompts")
        if self.encoded:
            self.source = LatentSet(self.root)
            if self.source.settings["autoencoder"]["weights"] != weights_digest(pipe.vae):
                raise ValueError(
                    f"data={str(self.root)!r}: was encoded by another autoencoder than the pipeline's; encode it with "
                    f"--vae {self.config.pipeline} --vae-subfolder vae"
                )
        else:
            by_class = "class_labels" in Requests.parameters(pipe)
            try:
                self.source = open_source(self.root, captions=not by_class)
            except ValueError as error:
                raise ValueError(str(error).replace("src", "data", 1)) from None

    def prompts(self, by_class: bool) -> list[str]:
        """What each label stands for: captions, or names of classes."""
        assert self.source is not None
        return list(self.source.classes if by_class else self.source.captions)

    def sizes(self, requested: Sequence[Size | None]) -> list[Size]:
        """(height, width) of pictures, in pixels."""
        if isinstance(self.source, LatentSet):
            side = self.source.settings["image_size"]
            size = (side, side) if isinstance(side, int) else (side[0], side[1])
            if self.config.sizes and list(requested) != [size]:
                raise ValueError(
                    f"sizes={self.config.sizes}: the data was encoded at {size[0]}x{size[1]}; leave it out"
                )
            return [size]
        return [default_size(self.pipe) if size is None else size for size in requested]

    def encode(self, cache: Path, sizes: Sequence[Size], rank: int, world: int, wait: Callable[[], None]) -> None:
        """Writes the latents of each size that has pictures; the processes share the work."""
        if isinstance(self.source, LatentSet):
            self.latents = {sizes[0]: self.source}
            return
        assert self.source is not None
        frames = int(dict(each.split("=", 1) for each in self.config.call).get("num_frames", 1))
        rows = nearest_sizes(self.source, sizes)
        self.latents = {}
        for size, of_size in rows.items():
            folder = cache / f"latents-{size[0]}x{size[1]}"
            part = Subset(self.source, of_size)
            encoding = Encoding(vae=self.config.pipeline, vae_subfolder="vae", image_size=size, frames=frames)
            if not (folder / "index.json").is_file():
                try:
                    if rank == 0:
                        prepare(part, folder, self.pipe.vae, encoding)
                    wait()
                    encode(part, folder, self.pipe.vae, encoding, rank=rank, world=world)
                    wait()
                    if rank == 0:
                        finish(part, folder, encoding)
                    wait()
                except ValueError as error:
                    raise ValueError(str(error).replace("src", "data", 1)) from None
            self.latents[size] = LatentSet(folder)

    def record_captions(self, cache: Path, requests: Requests, by_row: frozenset[str]) -> None:
        """Writes the calls of the captions that occur at each size, and of none: the unconditional branch."""
        for size, latents in self.latents.items():
            folder = cache / f"captions-{size[0]}x{size[1]}"
            if (folder / "done.json").is_file():
                continue
            prompts = [requests.prompts[label] for label in used_labels(latents)]
            if self.config.prompt_dropout:
                prompts.append(requests.nothing)
            batch = self.config.teacher_batch
            for number in range(math.ceil(len(prompts) / batch)):
                path = folder / f"{number:06d}.safetensors"
                if not path.is_file():
                    part = prompts[number * batch : (number + 1) * batch]
                    call = first_call(self.pipe, requests.request(part, number=0, steps=1, size=size))
                    sample = call.pop(self.family.sample)
                    self.check(sample, latents, size)
                    call, rows = conditional(call, by_row, len(sample), len(part), self.family.unconditional_half)
                    save_calls(path, [(call, torch.zeros(rows, 1))], by_row - {self.family.sample})
            write_text(folder / "done.json", "{}\n")

    def check(self, sample: Any, latents: LatentSet, size: Size) -> None:
        """Raises ValueError where the pipeline draws samples of another shape than the pictures'."""
        assert self.family.pack is not None
        drawn = tuple(sample[0].shape)
        pictures = tuple(self.family.pack(torch.zeros(1, *latents.shape)).shape[1:])
        if drawn != pictures:
            raise ValueError(
                f"data: a {type(self.pipe).__name__} draws samples of shape {drawn} at {size[0]}x{size[1]}, pictures "
                f"encode to {pictures}; give clips of as many frames (--call num_frames=…), or distil it with prompts"
            )

    def examples(self, cache: Path) -> "CaptionedLatents":
        calls = {size: cache / f"captions-{size[0]}x{size[1]}" for size in self.latents}
        return CaptionedLatents(self.latents, calls, self.config.prompt_dropout)


class CaptionedLatents:
    """Latents with the calls of their captions: an entry a picture, and for a share `dropout` of all, one without."""

    def __init__(self, latents: dict[Size, LatentSet], calls: dict[Size, Path], dropout: float):
        self.latents = list(latents.values())
        self.files: list[CallFile] = []
        self.entries: list[tuple[int, int, int, int]] = []
        """(size, row of its latents, file, row of it)."""
        kinds: dict[tuple[int, str], list[int]] = {}
        for number, (size, of_size) in enumerate(latents.items()):
            places: list[tuple[int, int]] = []
            for batch in sorted({path.name.split(".")[0] for path in calls[size].glob("*.safetensors")}):
                of_batch: dict[int, tuple[int, int]] = {}
                for path in sorted(calls[size].glob(f"{batch}*.safetensors")):
                    file = CallFile(path)
                    of_batch |= {place: (len(self.files), row) for row, place in enumerate(file.places)}
                    self.files.append(file)
                places += [of_batch[place] for place in sorted(of_batch)]
            order = {label: place for place, label in enumerate(used_labels(of_size))}
            labels = labels_of(of_size)
            rows = [(row, places[order[label]]) for row, label in enumerate(labels)]
            if dropout:
                count = round(len(labels) * dropout / (1 - dropout))
                rows += [(i * len(labels) // max(count, 1) % len(labels), places[-1]) for i in range(max(count, 1))]
            for row, (file_number, place) in rows:
                kinds.setdefault((number, self.files[file_number].kind), []).append(len(self.entries))
                self.entries.append((number, row, file_number, place))
        self.buckets = [np.array(kinds[kind]) for kind in sorted(kinds)]
        """Entries that can be in one batch."""

    def __len__(self) -> int:
        return len(self.entries)

    def shape(self, index: int) -> tuple[int, ...]:
        """(C, ...) of the latents of one entry, and of all in its bucket."""
        return tuple(self.latents[self.entries[index][0]].shape)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, CallBatch]:
        """moments (B, 2, C, ...) and the calls' arguments; indices: of one bucket."""
        entries = [self.entries[index] for index in indices]
        moments, _ = self.latents[entries[0][0]].__getitems__([row for _, row, _, _ in entries])
        _, call = batch_of_rows([(self.files[file], 0, place) for _, _, file, place in entries])
        return moments, call


def conditional(
    call: Arguments, by_row: frozenset[str], rows: int, prompts: int, half: int | None
) -> tuple[Arguments, int]:
    """A call's arguments for its prompts alone, where the pipeline runs both branches of guidance in one batch."""
    if half is None or rows != 2 * prompts:
        return call, rows
    first = prompts * (1 - half)
    taken = slice(first, first + prompts)
    return {name: value[taken] if name in by_row else value for name, value in call.items()}, prompts


def labels_of(latents: LatentSet) -> list[int]:
    return list(latents.rows["label"])


def used_labels(latents: LatentSet) -> list[int]:
    return sorted(set(labels_of(latents)))


def default_size(pipe: Any) -> Size:
    """(height, width) that the pipeline draws where it is not asked for a size. Raises ValueError if it is not said."""
    if side := getattr(pipe, "default_sample_size", None):
        side *= pipe.vae_scale_factor
    elif side := pipe.transformer.config.get("sample_size"):
        side *= downsampling(pipe.vae)
    if not isinstance(side, int):
        raise ValueError(f"sizes: not given, and a {type(pipe).__name__} does not say its own; give HEIGHTxWIDTH")
    return side, side


def nearest_sizes(source: Source, sizes: Sequence[Size]) -> dict[Size, list[int]]:
    """Rows of the source by the size whose aspect ratio is nearest; sizes without any are left out."""
    if len(sizes) == 1:
        return {sizes[0]: list(range(len(source)))}
    logs = np.array([math.log(height / width) for height, width in sizes])
    rows: dict[Size, list[int]] = {}
    for index in range(len(source)):
        try:
            height, width = source.size(index)
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"data: sample {index} cannot be read ({error}); mend or remove it") from None
        rows.setdefault(sizes[int(np.abs(logs - math.log(height / width)).argmin())], []).append(index)
    return {size: rows[size] for size in sizes if size in rows}


RATIOS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 16 / 9, 2.0)


def aspect_sizes(side: int, multiple: Size) -> list[Size]:
    """Sizes of about side² pixels at the usual aspect ratios, their sides multiples of `multiple` = (rows, columns).

    Raises ValueError where a side is smaller than that.
    """
    sizes = []
    for ratio in RATIOS:
        exact = side * math.sqrt(ratio), side / math.sqrt(ratio)
        height, width = (round(length / step) * step for length, step in zip(exact, multiple, strict=True))
        if not (height and width):
            raise ValueError(
                f"sizes={side}: a window has {multiple[0]}x{multiple[1]} pixels; give at least {2 * max(multiple)}"
            )
        sizes.append((height, width))
    return list(dict.fromkeys(sizes))
