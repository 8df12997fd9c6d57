"""Pictures with captions or classes, as distillation trains on them: encoded once by the pipeline's own parts."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from elit.config import DistillConfig
from elit.data.encode import Encoding, encode
from elit.data.images import LatentSet, inspect_pictures
from elit.data.source import open_source
from elit.elastic.families import family_of
from elit.elastic.families.family import Pipeline, Tree
from elit.elastic.pipelines import (
    CallBatch,
    RecordedCalls,
    Requests,
    Size,
    buckets_of,
    default_size,
    first_call,
    save_calls,
    take_rows,
    takes_classes,
)

ROWS = 32  # calls of a validation


class CaptionedImages:
    """Latents with the calls of their captions, for a share without; `prepare` makes it complete."""

    def __init__(self, config: DistillConfig, pipe: Pipeline):
        self.config, self.pipe, self.family = config, pipe, family_of(pipe.transformer)
        kind, by_class = type(pipe).__name__, takes_classes(pipe)
        if self.family.pack is None or getattr(pipe, "vae", None) is None:
            raise ValueError(f"data is not supported for a {kind}, whose samples are not latents alone; use prompts")
        self.source = open_source(Path(str(config.data)), captions=not by_class)
        self.prompts = list(self.source.classes if by_class else self.source.captions)
        self.latents: dict[Size, LatentSet] = {}
        self.calls: dict[Size, RecordedCalls] = {}
        self.entries: list[tuple[Size, int, int]] = []  # (size, row of its latents, row of its call)

    def prepare(self, cache: Path, requests: Requests, layout: Callable[[], Tree], accelerator: Accelerator) -> None:
        """Writes what is not in the cache, the latents by all processes, the captions' calls by the first; opens it."""
        config, source, wait = self.config, self.source, accelerator.wait_for_everyone
        rank, world = accelerator.process_index, accelerator.num_processes
        sizes = [size or default_size(self.pipe) for size in requests.sizes]
        requests.sizes[:] = sizes
        rows: dict[Size, list[int]] = {}
        pictures = inspect_pictures(source) if len(sizes) > 1 else [(1, 1)] * len(source)
        for index, found in enumerate(pictures):  # each goes to the size of the nearest aspect ratio
            if isinstance(found, str):
                raise ValueError(found)
            ratio = math.log(found[1] / found[0])
            nearest = min(sizes, key=lambda size, ratio=ratio: abs(math.log(size[0] / size[1]) - ratio))
            rows.setdefault(nearest, []).append(index)
        frames = int(dict(each.split("=", 1) for each in config.call).get("num_frames", 1))
        for size in [size for size in dict.fromkeys(sizes) if size in rows]:
            name = f"{size[0]}x{size[1]}"
            encoding = Encoding(vae=config.pipeline, vae_subfolder="vae", image_size=size, frames=frames)
            if not (cache / f"latents-{name}" / "index.json").is_file():
                part, folder = source.subset(rows[size]), cache / f"latents-{name}"
                encode(part, folder, self.pipe.vae, encoding, rank=rank, world=world, wait=wait)
            self.latents[size] = latents = LatentSet(cache / f"latents-{name}")
            labels, dropout = list(latents.rows["label"]), config.prompt_dropout
            used = {label: row for row, label in enumerate(sorted(set(labels)))}
            if rank == 0:
                prompts = [requests.prompts[label] for label in used] + [requests.nothing] * (dropout > 0)
                self._record(cache / f"captions-{name}", prompts, requests, layout(), size)
            wait()
            self.calls[size] = RecordedCalls(cache / f"captions-{name}")
            self.entries += [(size, row, used[label]) for row, label in enumerate(labels)]
            without = max(1, round(len(labels) * dropout / (1 - dropout))) if dropout else 0
            self.entries += [(size, i * len(labels) // without, len(used)) for i in range(without)]
        buckets = buckets_of([(size, self.calls[size].kinds[call]) for size, _, call in self.entries])
        largest = max(buckets, key=len)
        self.held_out = largest[:: max(10, len(largest) // ROWS)][:ROWS]
        pictures = {self.entries[entry][:2] for entry in self.held_out}  # with a prompt or without
        trained = [[entry for entry in bucket if self.entries[entry][:2] not in pictures] for bucket in buckets]
        self.buckets = [np.array(entries) for entries in trained if entries]
        if not self.buckets:
            raise ValueError("data must have at least 2 pictures, of which one is for validation")

    def _record(self, folder: Path, prompts: Sequence[str | int], requests: Requests, layout: Tree, size: Size) -> None:
        """Writes the transformer's calls for captions. Raises ValueError where it samples another shape than theirs."""
        assert self.family.pack is not None
        batch, half = self.config.teacher_batch, self.family.unconditional_half
        layout = {argument: part for argument, part in layout.items() if argument != self.family.sample}
        pictures = tuple(self.family.pack(torch.zeros(1, *self.latents[size].shape)).shape[1:])
        for first in range(0, len(prompts), batch):
            part, path = list(prompts[first : first + batch]), folder / f"{first:08d}.pt"
            if not path.is_file():
                call = first_call(self.pipe, requests.request(part, size=size))
                sample = call.pop(self.family.sample)
                if (own := tuple(sample[0].shape)) != pictures:
                    made = f"a {type(self.pipe).__name__} makes samples of shape {own} at {size[0]}x{size[1]}"
                    advice = "give clips of as many frames (--call num_frames=…), or prompts"
                    raise ValueError(f"data: {made}, pictures encode to {pictures}; {advice}")
                if half is not None and len(sample) == 2 * len(part):
                    call = take_rows(layout, call, slice(len(part) * (1 - half), len(part) * (2 - half)))
                save_calls(path, [("cond", call, torch.zeros(len(part), 1))], layout)

    def shape(self, index: int) -> tuple[int, ...]:
        """(C, ...) of the latents of one entry, and of all in its bucket."""
        return tuple(self.latents[self.entries[index][0]].shape)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, CallBatch]:
        """moments (B, 2, C, ...) and the calls' arguments; indices: of one bucket."""
        sizes, rows, calls = zip(*(self.entries[index] for index in indices), strict=True)
        moments, _ = self.latents[sizes[0]].__getitems__(rows)
        return moments, self.calls[sizes[0]].__getitems__(calls)[1]
