"""A stock diffusers pipeline step by step: its own calls, each of which waits behind every step.

Requests join and leave between two steps. With `exact`, the default on a CPU, every picture has a call of its own, and
with it the pixels of the pipeline called alone. Else pictures share a call where they start at the same step and are
the same in size, steps, budgets and guidance; a call's batch is fixed when it starts, and budgets are not mixed in it.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import torch
from PIL import Image

from elit.budgets import evenly_spaced
from elit.elastic.stepwise import StepwiseCall
from elit.elastic.stock import EXAMPLE, StockPipeline
from elit.planner.cost import Costs, branch_latents, non_negative_prices
from elit.sampling.settings import Sampling
from elit.serve.engine import MOST_COSTS, encode

MEASURED_STEPS = 3


@dataclass
class Batch:
    """A call, and how many requests' pictures are in it."""

    call: StepwiseCall
    requests: int


@dataclass
class PipelineImages:
    """The images of one request in progress."""

    prompt: str
    negative: str
    seeds: tuple[int, ...]
    setting: Sampling
    scale: float
    size: tuple[int, int]
    step: int = 0
    batches: list[Batch] = field(default_factory=list)
    """One a picture with `exact`, else one."""
    first: int = 0
    """Place of its pictures in a shared batch."""
    error: Exception | None = None
    """What ended its call, and with it this request alone."""

    @property
    def count(self) -> int:
        return len(self.seeds)


class PipelineEngine:
    """What `Engine` is for a network, for a stock pipeline."""

    has_previews = False

    def __init__(self, stock: StockPipeline, *, exact: bool | None = None, size: tuple[int, int] | None = None):
        """exact: None = on a CPU. size: (width, height) where a request names none; None = the pipeline's own.

        Raises ValueError for a size that the pipeline has not.
        """
        self.stock, self.size = stock, size or stock.size
        if size is not None and size != stock.size:
            stock.check_size(size)
        self.exact = stock.transformer.device.type == "cpu" if exact is None else exact

    @property
    def budgets(self) -> tuple[int, ...]:
        return self.stock.budgets

    def describe(self) -> dict[str, Any]:
        """What a client may ask for: sizes in pixels, budgets, classes or text, and what it gets unless it asks."""
        stock = self.stock
        text = stock.takes_text
        return {
            "size": list(self.size),
            "multiple": stock.multiple if stock.has_sizes else 0,
            "budgets": list(stock.budgets),
            "text": text,
            "classes": len(stock.classes),
            "class_names": list(stock.classes),
            "negative_prompt": "negative_prompt" in stock.known,
            "guides": stock.guides_by is not None,
            "step_gflops": self._step_gflops,
            "guidance_scale": stock.own_scale,
        }

    @cached_property
    def _step_gflops(self) -> list[tuple[int, float]]:
        """(latents per window, GFLOPs) of one branch of a step of one image."""
        return [
            (count, self.stock.flops(budget=count, size=self.size) / 1e9)
            for count in evenly_spaced(self.budgets, MOST_COSTS)
        ]

    def begin(
        self,
        prompt: str,
        seeds: Sequence[int],
        setting: Sampling,
        *,
        size: tuple[int, int] | None = None,
        negative: str = "",
    ) -> PipelineImages:
        """A request, whose call begins with its first step."""
        return PipelineImages(prompt, negative, tuple(seeds), setting, scale_of(setting), size or self.size)

    def step(self, running: Sequence[PipelineImages]) -> None:
        """One step of all; where a call fails, its requests have an `error`."""
        self._start([each for each in running if not each.batches])
        calls = {id(batch): (batch.call, each) for each in running for batch in each.batches}
        errors: dict[int, Exception] = {}
        for key, (call, each) in calls.items():
            try:
                call.advance()
                # A second-order scheduler has more steps than were asked for.
                while call.total and call.steps * each.setting.steps < (each.step + 1) * call.total and call.advance():
                    pass
            except Exception as error:  # one request's text or size is no reason to fail the others
                errors[key] = error
        for each in running:
            each.step += 1
            each.error = next((errors[id(batch)] for batch in each.batches if id(batch) in errors), None)

    def _start(self, new: Sequence[PipelineImages]) -> None:
        if self.exact:
            for each in new:
                each.batches = [Batch(self._call([each], [seed]), 1) for seed in each.seeds]
            return

        def alike(each: PipelineImages) -> Any:
            setting = each.setting
            return each.size, setting.steps, setting.budget or 0, weak_of(setting) or 0, each.scale

        for _, group in groupby(sorted(new, key=alike), key=alike):
            together = list(group)
            seeds = [seed for each in together for seed in each.seeds]
            batch, first = Batch(self._call(together, seeds), len(together)), 0
            for each in together:
                each.batches, each.first, first = [batch], first, first + each.count

    def _call(self, requests: Sequence[PipelineImages], seeds: Sequence[int]) -> StepwiseCall:
        """Of one of a request's pictures where there is one seed, else of all pictures of all requests."""
        one, repeats = requests[0], [1 if len(seeds) == 1 else each.count for each in requests]
        rows = [each for each, count in zip(requests, repeats, strict=True) for _ in range(count)]
        return self.stock.call(
            [each.prompt for each in rows],
            seeds,
            steps=one.setting.steps,
            budget=one.setting.budget,
            scale=one.scale,
            guidance_budget=weak_of(one.setting),
            size=one.size,
            negatives=[each.negative for each in rows],
        )

    def finish(self, images: PipelineImages, kind: str = "png") -> list[bytes]:
        """The pictures, each a file's content."""
        pictures: list[Image.Image] = []
        for batch in images.batches:
            pictures += batch.call.finish().images
        return [encode(picture, kind) for picture in pictures[images.first : images.first + images.count]]

    def leave(self, images: PipelineImages) -> None:
        """Nobody waits for these images any more; a call ends with the last that are in it."""
        for batch in images.batches:
            batch.requests -= 1
            if not batch.requests:
                batch.call.give_up()

    def gflops(self, setting: Sampling, size: tuple[int, int] | None = None) -> float:
        """Of one image, all steps and guidance: the transformer's blocks, Read and Write."""
        size = size or self.size
        branches = [self.stock.flops(budget=count, size=size) for count in branch_latents(setting)]
        return setting.steps * sum(branches) / 1e9

    def measure(self) -> Costs:
        """What steps take here: of one picture, and of two where they share calls, at three budgets."""
        budgets = self.budgets
        measured = sorted({budgets[0], budgets[len(budgets) // 2], budgets[-1]})
        rows, ms, ends = [], [], []
        for count in (1,) if self.exact else (1, 2):
            for latents in measured:
                step_ms, end_ms = self._time(count, Sampling(steps=MEASURED_STEPS, budget=latents))
                rows.append((0 if self.exact else 1, count, count * latents, count * latents**2))
                ms.append(step_ms)
                ends.append(end_ms / count)
        relative = np.array(rows, dtype=np.float64) / np.array(ms)[:, None]
        core, around, linear, square = non_negative_prices(relative)
        # Each different budget is a call of its own, so a forward's own price is the core's.
        around = max(around, 1e-6)
        return Costs(
            call=0.0,
            core=core,
            around=around,
            linear=linear,
            square=square,
            image=statistics.median(ends),
            separate=self.exact,
        )

    def _time(self, count: int, setting: Sampling) -> tuple[float, float]:
        """Milliseconds of a step, and of all else (text encoder, autoencoder, files)."""
        images = self.begin(self.example(), range(count), setting)
        steps = []
        start = time.perf_counter()
        for _ in range(setting.steps):
            before = time.perf_counter()
            self.step([images])
            self._synchronize()
            steps.append(1e3 * (time.perf_counter() - before))
        self.finish(images)
        total = 1e3 * (time.perf_counter() - start)
        each = statistics.median(steps[1:])
        return each, max(0.0, total - setting.steps * each)

    def example(self) -> str:
        return EXAMPLE if self.stock.takes_text else "0"

    def _synchronize(self) -> None:
        device = self.stock.transformer.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def scale_of(setting: Sampling) -> float:
    return setting.guidance.scale if setting.guidance else 1.0


def weak_of(setting: Sampling) -> Any:
    return setting.guidance.budget if setting.guidance else None
