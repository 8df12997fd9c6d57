"""A network step by step: what waits between two steps is a few tensors, so requests join and leave at any step.

The velocity is `elit.sample`'s. On a CPU every image has a forward of its own, since the rounding of a matrix product
depends on its number of rows: then an image has the pixels of
`elit sample --batch-size 1` to the byte, whatever is beside it.
Elsewhere, or with `exact=False`, all images of a step are one forward, whose budgets are mixed.
"""

import io
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from elit.budgets import evenly_spaced
from elit.costs.flops import count_flops
from elit.elastic.load import load_model
from elit.models.transformer import Transformer
from elit.planner.cost import Costs, non_negative_prices
from elit.pretrained import model_folder
from elit.sampling.autoencoders import downsampling, load_autoencoder
from elit.sampling.engine import NetworkEngine, NetworkRun
from elit.sampling.pictures import image_grid
from elit.sampling.settings import Sampling

MOST_COSTS = 17
"""Budgets of which a service tells the cost of a step; between them it is nearly linear."""
FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
Forward = Callable[..., Tensor]


@dataclass
class Images:
    """The images of one request in progress, a run each."""

    runs: list[NetworkRun]
    setting: Sampling
    error: Exception | None = None

    @property
    def count(self) -> int:
        return len(self.runs)

    @property
    def step(self) -> int:
        return self.runs[0].steps_done


class Engine:
    """A saved network or `ElitPipeline`, with what makes pictures of its samples."""

    has_previews = True

    def __init__(
        self,
        model: str | Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
        exact: bool | None = None,
    ):
        """exact: None = on a CPU. Raises ValueError for a model that cannot be loaded, or makes no pictures."""
        folder = model_folder(model)
        loaded = load_model(folder, torch_dtype=dtype)
        if not isinstance(loaded, Transformer):
            raise ValueError(
                f"model={str(model)!r}: an elastified {type(loaded).__name__} alone; give the folder of its pipeline"
            )
        self.model: Transformer = loaded.to(device).eval()
        self.vae = load_autoencoder(folder / "vae", required=False, torch_dtype=dtype)
        if self.vae is not None:
            self.vae.to(device)
        if len(self.model.sample_size) != 2 or (self.vae is None and self.model.config.in_channels not in (1, 3)):
            raise ValueError(f"model={str(model)!r}: makes no pictures; elit serve serves images")
        self.exact = self.model.device.type == "cpu" if exact is None else exact
        self.engine = NetworkEngine(self.model, self.vae, name=str(model), compile=compile, exact=self.exact)

    @property
    def budgets(self) -> tuple[int, ...]:
        return self.model.budgets

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        height, width = (length * downsampling(self.vae) for length in self.model.sample_size)
        return width, height

    def describe(self) -> dict[str, Any]:
        """What a client may ask for: size (width, height) in pixels, budgets, classes or text."""
        text = self.model.takes_text
        return {
            "size": list(self.size),
            "multiple": 0,
            "budgets": list(self.model.budgets),
            "text": text,
            "classes": 0 if text else self.model.config.num_classes,
            "class_names": list(self.model.config.get("class_names") or ()),
            "negative_prompt": False,
            "guides": True,
            "step_gflops": self._step_gflops,
            "guidance_scale": 1.0,
        }

    @cached_property
    def _step_gflops(self) -> list[tuple[int, float]]:
        """(latents per group, GFLOPs) of one branch of a step of one image; 0 latents where there is no dial."""
        counts: Sequence[int | None] = evenly_spaced(self.budgets, MOST_COSTS) or [None]
        return [(count or 0, count_flops(self.model, budget=count) / 1e9) for count in counts]

    def begin(
        self,
        prompt: str,
        seeds: Sequence[int],
        setting: Sampling,
        *,
        size: tuple[int, int] | None = None,
        negative: str = "",
    ) -> Images:
        """Noise and conditions of a request. size, negative: a network has one and none.

        Raises ValueError for an unknown class.
        """
        y = self.engine.conditions([prompt])
        return Images([self.engine.begin(y, [seed], setting) for seed in seeds], setting)

    def step(self, running: Sequence[Images]) -> None:
        """One step of all."""
        self.engine.step([run for each in running for run in each.runs])

    def finish(self, images: Images, kind: str = "png") -> list[bytes]:
        """The pictures, each a file's content."""
        return [encode(image_grid(run.pictures(), 1), kind) for run in images.runs]

    def preview(self, images: Images, kind: str = "png") -> bytes:
        """The first picture as it would be if the velocity stayed as it is."""
        return encode(image_grid(images.runs[0].preview(), 1), kind)

    def leave(self, images: Images) -> None:
        """Nobody waits for these images any more: they hold nothing but their tensors."""

    def gflops(self, setting: Sampling, size: tuple[int, int] | None = None) -> float:
        """Of one image, all steps and guidance."""
        return self.engine.gflops(setting)

    def measure(self, *, seconds: float = 4.0) -> Costs:
        """What steps take here: forwards at the least, the middle and the full budget, of one image, of two, guided."""
        budgets = self.model.budgets
        measured = sorted({budgets[0], budgets[len(budgets) // 2], budgets[-1]}) if budgets else [None]
        cases = [[each] for each in measured] + [[each, each] for each in measured]
        if len(measured) > 1:
            cases.append([measured[0], measured[-1]])
        y = self.model.example_condition(2).to(self.model.device)
        x = torch.zeros(2, self.model.config.in_channels, *self.model.sample_size, device=self.model.device)
        taken: list[list[float]] = [[] for _ in cases]
        start = time.perf_counter()
        with torch.no_grad():
            while len(taken[-1]) < 3 or time.perf_counter() - start < seconds:  # the first round warms up
                for case, times in zip(cases, taken, strict=True):
                    n = len(case)
                    times.append(self._timed(partial(self.model, x[:n], x.new_full((n,), 0.5), y[:n], case)))
                if time.perf_counter() - start > 3 * seconds and len(taken[-1]) > 1:
                    break
        ms = [statistics.median(times[1:]) for times in taken]
        rows = [
            (1, len(set(case)), len(case), sum(b or 0 for b in case), sum((b or 0) ** 2 for b in case))
            for case in cases
        ]
        relative = np.array(rows, dtype=np.float64) / np.array(ms)[:, None]
        call, core, around, linear, square = non_negative_prices(relative)
        image = self.begin(self.example(), [0], Sampling(steps=1, budget=budgets[-1] if budgets else None))
        finish = statistics.median(self._timed(lambda: self.finish(image)) for _ in range(3))
        return Costs(
            call=call, core=core, around=around, linear=linear, square=square, image=finish, separate=self.exact
        )

    def example(self) -> str:
        return "a picture" if self.model.takes_text else "0"

    def _timed(self, run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return 1e3 * (time.perf_counter() - start)


def encode(picture: Image.Image, kind: str) -> bytes:
    """A picture as a file's content."""
    buffer = io.BytesIO()
    picture.save(buffer, format=FORMATS[kind])
    return buffer.getvalue()
