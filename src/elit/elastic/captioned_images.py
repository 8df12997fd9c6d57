"""Pictures with captions or classes, as distillation trains on them: encoded once by the pipeline's own parts.

    CACHE/latents-1024x1024/     the pictures that go to a size, as `elit encode` writes them
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
from elit.data.encode import Encoding, encode
from elit.data.images import LatentSet
from elit.data.source import Source, open_source
from elit.elastic.families.family import Family, Pipeline
from elit.elastic.pipelines import Requests, Size, default_size, takes_classes
from elit.elastic.recording import CallBatch, RecordedCalls, buckets_of, first_call, save_calls
from elit.elastic.trees import Tree, take_rows
from elit.models.saved import weights_digest


class CaptionedImages:
    """Latents with the calls of their captions: an entry a picture, and for a share `prompt_dropout` of all, one
    without a caption. `encode`, `record_captions` by one process and `read_captions` make it complete.

    Raises ValueError where there are none, or nothing of this pipeline's class can be trained on them.
    """

    def __init__(self, config: DistillConfig, pipe: Pipeline, family: Family):
        self.config, self.pipe, self.family = config, pipe, family
        kind, root, by_class = type(pipe).__name__, Path(str(config.data)), takes_classes(pipe)
        if family.pack is None or getattr(pipe, "vae", None) is None:
            raise ValueError(f"data is not supported for a {kind}, whose samples are not latents alone; use prompts")
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
        self.prompts = list(self.source.classes if by_class else self.source.captions)
        """The caption or class name of each label."""
        self.latents: dict[Size, LatentSet] = {}
        self.calls: dict[Size, RecordedCalls] = {}
        self.entries: list[tuple[Size, int, int]] = []
        """(size, row of its latents, row of its call)."""
        self.buckets: list[np.ndarray] = []

    def encode(self, cache: Path, requests: Requests, rank: int, world: int, wait: Callable[[], None]) -> None:
        """Writes the latents of each size that has pictures; the processes share the work."""
        if isinstance(self.source, LatentSet):
            side = self.source.settings["image_size"]
            size: Size = (side, side) if isinstance(side, int) else (side[0], side[1])
            if self.config.sizes and requests.sizes != [size]:
                raise ValueError(f"sizes must be {size[0]}x{size[1]}, at which the data was encoded, or left out")
            requests.sizes[:], self.latents[size] = [size], self.source
            return
        sizes: list[Size] = [default_size(self.pipe) if size is None else size for size in requests.sizes]
        requests.sizes[:] = sizes
        frames = int(dict(each.split("=", 1) for each in self.config.call).get("num_frames", 1))
        for of_size, rows in nearest_sizes(self.source, sizes).items():
            folder = cache / f"latents-{of_size[0]}x{of_size[1]}"
            encoding = Encoding(vae=self.config.pipeline, vae_subfolder="vae", image_size=of_size, frames=frames)
            if not (folder / "index.json").is_file():
                part = self.source.subset(rows)
                encode(part, folder, self.pipe.vae, encoding, rank=rank, world=world, wait=wait)
            self.latents[of_size] = LatentSet(folder)

    def record_captions(self, cache: Path, requests: Requests, layout: Tree) -> None:
        """Writes the calls of the captions that occur at each size, and of none: the unconditional branch."""
        name, batch, half = self.family.sample, self.config.teacher_batch, self.family.unconditional_half
        layout = {argument: part for argument, part in layout.items() if argument != name}
        for size, latents in self.latents.items():
            prompts = [requests.prompts[label] for label in used_labels(latents)]
            prompts += [requests.nothing] * (self.config.prompt_dropout > 0)
            for first in range(0, len(prompts), batch):
                part, path = prompts[first : first + batch], captions_folder(cache, size) / f"{first:08d}.pt"
                if not path.is_file():
                    call = first_call(self.pipe, requests.request(part, number=0, steps=1, size=size))
                    sample = call.pop(name)
                    self.check(sample, latents, size)
                    if half is not None and len(sample) == 2 * len(part):
                        call = take_rows(layout, call, slice(len(part) * (1 - half), len(part) * (2 - half)))
                    save_calls(path, [("cond", call, torch.zeros(len(part), 1))], layout)

    def check(self, sample: Tree, latents: LatentSet, size: Size) -> None:
        """Raises ValueError where the pipeline samples another shape than the pictures'."""
        assert self.family.pack is not None
        own, pictures = tuple(sample[0].shape), tuple(self.family.pack(torch.zeros(1, *latents.shape)).shape[1:])
        if own != pictures:
            raise ValueError(
                f"data: a {type(self.pipe).__name__} makes samples of shape {own} at {size[0]}x{size[1]}, pictures "
                f"encode to {pictures}; give clips of as many frames (--call num_frames=…), or distil it with prompts"
            )

    def read_captions(self, cache: Path) -> None:
        """Opens what `record_captions` wrote."""
        dropout = self.config.prompt_dropout
        for size, latents in self.latents.items():
            calls = self.calls[size] = RecordedCalls(captions_folder(cache, size))
            labels = list(latents.rows["label"])
            place = {label: row for row, label in enumerate(used_labels(latents))}
            self.entries += [(size, row, place[label]) for row, label in enumerate(labels)]
            if dropout:
                count = max(1, round(len(labels) * dropout / (1 - dropout)))
                self.entries += [(size, i * len(labels) // count, len(calls) - 1) for i in range(count)]
        self.buckets = buckets_of([(size, self.calls[size].kinds[call]) for size, _, call in self.entries])

    def __len__(self) -> int:
        return len(self.entries)

    def shape(self, index: int) -> tuple[int, ...]:
        """(C, ...) of the latents of one entry, and of all in its bucket."""
        return tuple(self.latents[self.entries[index][0]].shape)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, CallBatch]:
        """moments (B, 2, C, ...) and the calls' arguments; indices: of one bucket."""
        sizes, rows, calls = zip(*(self.entries[index] for index in indices), strict=True)
        moments, _ = self.latents[sizes[0]].__getitems__(rows)
        return moments, self.calls[sizes[0]].__getitems__(calls)[1]


def captions_folder(cache: Path, size: Size) -> Path:
    return cache / f"captions-{size[0]}x{size[1]}"


def used_labels(latents: LatentSet) -> list[int]:
    return sorted(set(latents.rows["label"]))


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
            raise ValueError(f"sizes must be at least {2 * max(multiple)}, the pixels of two windows, got {side}")
        sizes.append((height, width))
    return list(dict.fromkeys(sizes))
