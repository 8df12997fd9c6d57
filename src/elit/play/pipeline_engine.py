"""What makes the page's pictures where the model is a diffusers pipeline whose transformer has a dial."""

import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from PIL import Image

from elit.elastic.stock import EXAMPLE, StockFolder, StockPipeline
from elit.play.engine import Cancelled, Cost, Picture, Tick
from elit.sampling.draw import environment_of, weights_fingerprint
from elit.sampling.pictures import encode_picture, from_pictures, sheet_frames
from elit.sampling.settings import SampleRecord, SampleSettings


@dataclass
class PipelineEngine:
    """A stock pipeline, one run at a time. It has no sweep's table, no plans, and its inside is not looked at."""

    stock: StockPipeline
    dtype: str = "float32"
    has_thumbnails: ClassVar[bool] = True
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while the pipeline runs."""
    _measured: dict[Any, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = self.stock.name
        self.weights = weights_fingerprint(self.stock.transformer)
        self.environment = environment_of(self.stock.transformer.device)

    @classmethod
    def load(cls, stock: StockFolder, *, device: str, dtype: str) -> "PipelineEngine":
        """Raises ValueError for a pipeline that cannot be loaded, or makes no pictures."""
        return cls(StockPipeline.load(stock, device=device, dtype=getattr(torch, dtype)), dtype)

    @property
    def takes_text(self) -> bool:
        return self.stock.takes_text

    @property
    def classes(self) -> tuple[str, ...]:
        return self.stock.classes

    @property
    def budgets(self) -> tuple[int, ...]:
        return self.stock.budgets

    @property
    def guidances(self) -> tuple[str, ...]:
        """Kinds of guidance that can be chosen."""
        return ("none", "cfg", "ccfg") if self.stock.guides_by else ("none",)

    @property
    def start(self) -> dict[str, Any]:
        """Where the dial stands at first, beside all latents: an example, and the pipeline's own guidance."""
        own = self.stock.own_scale
        guided = {"guidance": "cfg", "scale": own} if own > 1 else {}
        return {"condition": EXAMPLE if self.takes_text else self.classes[0]} | guided

    def check(self, settings: SampleSettings) -> None:
        """Raises ValueError, in one line, for a class or prompt that this pipeline does not take."""
        self.stock.conditions(settings)

    def cost(self, settings: SampleSettings) -> Cost:
        """Raises ValueError for settings that this pipeline does not take."""
        with self.lock:  # the first time at a size the text encoder runs
            gflops = self.stock.gflops(settings)
            full = self.stock.gflops(replace(settings, budget="full"))
        return Cost(
            gflops=gflops,
            full_gflops=full,
            predicted_ms=None,
            measured_ms=self._measured.get(_work(settings)),
            metric=None,
            quality=None,
        )

    def generate(
        self, settings: SampleSettings, tick: Tick | None = None, stop: threading.Event | None = None
    ) -> Picture:
        """One picture. Waits for the run before it. Raises ValueError, and `Cancelled` once `stop` is set."""

        def on_step(done: int, total: int) -> None:
            if stop is not None and stop.is_set():
                raise Cancelled
            if tick:
                tick(done, total)

        with self.lock:
            gflops = self.stock.gflops(settings)
            start = time.perf_counter()
            image = self.stock.picture(settings, on_step=on_step)
            ms = 1e3 * (time.perf_counter() - start)
        self._measured[_work(settings)] = ms
        pixels = from_pictures([image])
        record = SampleRecord(model=self.name, weights=self.weights, settings=settings, made_with=self.environment)
        file = encode_picture(sheet_frames(pixels, ".png"), ".png", record.to_text())
        return Picture(settings, file, ".png", pixels[0], (), ms, gflops)

    def thumbnails(self, settings: SampleSettings) -> list[Image.Image]:
        """A picture of every class."""
        with self.lock:
            one = [replace(settings, labels=(name,), count=1) for name in self.classes]
            pictures = [self.stock.picture(each) for each in one]
        return [sheet_frames(from_pictures([picture]), ".png")[0] for picture in pictures]


def _work(settings: SampleSettings) -> Any:
    """What a run's time depends on."""
    off = settings.guidance == "none" or settings.scale <= 1
    weak = settings.guidance_budget if settings.guidance == "ccfg" else None
    return settings.steps, settings.budget, not off and settings.guidance, weak
