"""Pictures with captions or classes, as distillation trains on them: encoded once by the pipeline's own parts.

    CACHE/latents-1024x1024/     what `elit encode` writes: the pictures that go to a size
    CACHE/captions-1024x1024/    the arguments of the transformer's call that their captions make

A call's arguments are recorded from the pipeline, as in `recording.py`; all but the noisy sample and the time, which
training draws.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from elit.config import DistillConfig
from elit.data.encode import encode
from elit.data.encoding import Encoding
from elit.data.latents import LatentSet
from elit.data.source import Source, open_source
from elit.elastic.families.family import Family, Pipeline
from elit.elastic.pipelines import Requests, takes_classes
from elit.elastic.recorded_calls import CallBatch, RecordedCalls, buckets_of, save_calls
from elit.elastic.recording import first_call
from elit.elastic.trees import Tree, take_rows
from elit.models.saved import weights_digest
from elit.sampling.autoencoders import downsampling

Size = tuple[int, int]


class CaptionedImages:
    """The pictures that `config.data` names, by the size that each goes to.

    Raises ValueError where there are none, or nothing of this pipeline's class can be trained on them.
    """

    def __init__(self, config: DistillConfig, pipe: Pipeline, family: Family):
        self.config, self.pipe, self.family = config, pipe, family
        kind, root = type(pipe).__name__, Path(str(config.data))
        if family.pack is None:
            raise ValueError(f"data: not supported for a {kind}, whose samples hold more; distil it with prompts")
        if getattr(pipe, "vae", None) is None:
            raise ValueError(f"data: this {kind} has no vae to encode pictures with; distil it with prompts")
        by_class = takes_classes(pipe)
        self.source: Source | LatentSet
        if (root / "encode.json").is_file():
            self.source = LatentSet(root)
            if self.source.settings["autoencoder"]["weights"] != weights_digest(pipe.vae):
                raise ValueError(
                    f"data={str(root)!r}: was encoded by another autoencoder than the pipeline's; encode it with "
                    f"--vae {config.pipeline} --vae-subfolder vae"
                )
        else:
            self.source = open_source(root, captions=not by_class)
        self.prompts: list[str] = list(self.source.classes if by_class else self.source.captions)
        """The caption or class name of each label."""
        self.latents: dict[Size, LatentSet] = {}

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
        frames = int(dict(each.split("=", 1) for each in self.config.call).get("num_frames", 1))
        for size, rows in nearest_sizes(self.source, sizes).items():
            folder = cache / f"latents-{size[0]}x{size[1]}"
            part = self.source.subset(rows)
            encoding = Encoding(vae=self.config.pipeline, vae_subfolder="vae", image_size=size, frames=frames)
            if not (folder / "index.json").is_file():
                encode(part, folder, self.pipe.vae, encoding, rank=rank, world=world, wait=wait)
            self.latents[size] = LatentSet(folder)

    def record_captions(self, cache: Path, requests: Requests, layout: Tree) -> None:
        """Writes the calls of the captions that occur at each size, and of none: the unconditional branch."""
        name, batch = self.family.sample, self.config.teacher_batch
        layout = {argument: part for argument, part in layout.items() if argument != name}
        for size, latents in self.latents.items():
            prompts = [requests.prompts[label] for label in used_labels(latents)]
            prompts += [requests.nothing] * (self.config.prompt_dropout > 0)
            for number in range(math.ceil(len(prompts) / batch)):
                path = cache / captions_folder(size) / f"{number:06d}.pt"
                if not path.is_file():
                    part = prompts[number * batch : (number + 1) * batch]
                    call = first_call(self.pipe, requests.request(part, number=0, steps=1, size=size))
                    sample = call.pop(name)
                    self.check(sample, latents, size)
                    if self.family.unconditional_half is not None and len(sample) == 2 * len(part):
                        first = len(part) * (1 - self.family.unconditional_half)
                        call = take_rows(layout, call, slice(first, first + len(part)))
                    save_calls(path, [("cond", call, torch.zeros(len(part), 1))], layout)

    def check(self, sample: Tree, latents: LatentSet, size: Size) -> None:
        """Raises ValueError where the pipeline samples another shape than the pictures'."""
        assert self.family.pack is not None
        drawn = tuple(sample[0].shape)
        pictures = tuple(self.family.pack(torch.zeros(1, *latents.shape)).shape[1:])
        if drawn != pictures:
            raise ValueError(
                f"data: a {type(self.pipe).__name__} makes samples of shape {drawn} at {size[0]}x{size[1]}, pictures "
                f"encode to {pictures}; give clips of as many frames (--call num_frames=…), or distil it with prompts"
            )

    def examples(self, cache: Path) -> "CaptionedLatents":
        calls = [RecordedCalls(cache / captions_folder(size)) for size in self.latents]
        return CaptionedLatents(list(self.latents.values()), calls, self.config.prompt_dropout)


class CaptionedLatents:
    """Latents with the calls of their captions: an entry a picture, and for a share `dropout` of all, one without."""

    def __init__(self, latents: list[LatentSet], calls: list[RecordedCalls], dropout: float):
        self.latents, self.calls = latents, calls
        self.entries: list[tuple[int, int, int]] = []
        """(size, row of its latents, row of its call)."""
        for number, (of_size, of_calls) in enumerate(zip(latents, calls, strict=True)):
            labels = list(of_size.rows["label"])
            place = {label: row for row, label in enumerate(used_labels(of_size))}
            self.entries += [(number, row, place[label]) for row, label in enumerate(labels)]
            if dropout:
                count = max(1, round(len(labels) * dropout / (1 - dropout)))
                self.entries += [(number, i * len(labels) // count, len(of_calls) - 1) for i in range(count)]
        self.buckets = buckets_of([(number, calls[number].kinds[call]) for number, _, call in self.entries])

    def __len__(self) -> int:
        return len(self.entries)

    def shape(self, index: int) -> tuple[int, ...]:
        """(C, ...) of the latents of one entry, and of all in its bucket."""
        return tuple(self.latents[self.entries[index][0]].shape)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, CallBatch]:
        """moments (B, 2, C, ...) and the calls' arguments; indices: of one bucket."""
        numbers, rows, calls = zip(*(self.entries[index] for index in indices), strict=True)
        moments, _ = self.latents[numbers[0]].__getitems__(rows)
        return moments, self.calls[numbers[0]].__getitems__(calls)[1]


def captions_folder(size: Size) -> str:
    return f"captions-{size[0]}x{size[1]}"


def used_labels(latents: LatentSet) -> list[int]:
    return sorted(set(latents.rows["label"]))


def default_size(pipe: Pipeline) -> Size:
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
        info = source.info(index)
        rows.setdefault(sizes[int(np.abs(logs - math.log(info.height / info.width)).argmin())], []).append(index)
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
