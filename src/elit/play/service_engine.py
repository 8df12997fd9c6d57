"""What makes the page's pictures where the page is on a service: requests to it."""

import base64
import io
import json
import threading
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from elit.arguments import class_numbers
from elit.budgets import parse_budget, resolve_budget
from elit.play.engine import Cancelled, Cost, Picture, Tick
from elit.play.service import ServiceClient
from elit.sampling.pictures import from_pictures, sheet_frames
from elit.sampling.settings import SampleSettings

DEADLINE_MS = 60_000.0


@dataclass
class ServiceEngine:
    """A service of `elit serve`. It computes a picture at exactly the settings of the dial, or refuses it."""

    client: ServiceClient
    dtype: str = "float32"
    has_thumbnails: ClassVar[bool] = False
    """A service is not asked for what nobody wanted."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    _measured: dict[SampleSettings, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        about = self.client.describe()
        self.name, self.about = f"{about['id']} at {self.client.url}", about["elit"]

    @property
    def takes_text(self) -> bool:
        return bool(self.about["text"])

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.about["class_names"]) or tuple(map(str, range(self.about["classes"])))

    @property
    def budgets(self) -> tuple[int, ...]:
        return tuple(self.about["budgets"])

    @property
    def guidances(self) -> tuple[str, ...]:
        kinds = ("none", "cfg", "ccfg") if self.budgets else ("none", "cfg")
        return kinds if self.about["guides"] else ("none",)

    @property
    def start(self) -> dict[str, Any]:
        own = float(self.about["guidance_scale"])
        guided = {"guidance": "cfg", "scale": own} if own > 1 else {}
        return {"condition": "a picture" if self.takes_text else self.classes[0]} | guided

    def check(self, settings: SampleSettings) -> None:
        """Raises ValueError, in one line, for a class that there is not, and settings that a service does not take."""
        if not self.takes_text:
            (number,) = class_numbers(settings.labels, self.about["class_names"], self.about["classes"])
            if not 0 <= number < self.about["classes"]:
                raise ValueError(f"labels={number}: classes are 0 to {self.about['classes'] - 1}")
        if "@" in settings.budget:
            raise ValueError(f"budget={settings.budget}: a service takes one budget for all steps; give one piece")
        if settings.guidance not in self.guidances:
            raise ValueError(f"guidance={settings.guidance}: this service has {', '.join(self.guidances)}")

    def cost(self, settings: SampleSettings) -> Cost:
        """GFLOPs by what the service says of a step. Raises ValueError."""
        self.check(settings)
        main = resolve_budget(None if settings.budget == "full" else settings.budget, self.budgets)
        full = self.budgets[-1] if self.budgets else None
        return Cost(
            gflops=self._gflops(settings, main),
            full_gflops=self._gflops(settings, full),
            predicted_ms=None,
            measured_ms=self._measured.get(settings),
            metric=None,
            quality=None,
        )

    def _gflops(self, settings: SampleSettings, budget: int | None) -> float:
        counts, costs = zip(*self.about["step_gflops"], strict=True)
        branches = [budget or 0]
        if settings.guidance != "none" and settings.scale != 1:
            weak = parse_budget(settings.guidance_budget) if settings.guidance == "ccfg" else None
            branches.append((resolve_budget(weak, self.budgets) if weak is not None else budget) or 0)
        return settings.steps * float(np.interp(branches, counts, costs).sum())

    def generate(
        self, settings: SampleSettings, tick: Tick | None = None, stop: threading.Event | None = None
    ) -> Picture:
        """One picture. Raises ValueError for what the service refuses, and `Cancelled` once `stop` is set."""
        self.check(settings)
        body: dict[str, Any] = {
            "prompt": (settings.prompts or settings.labels)[0],
            "seed": settings.seed,
            "num_inference_steps": settings.steps,
            "deadline_ms": DEADLINE_MS,
            "guidance_scale": 1.0 if settings.guidance == "none" else settings.scale,
        }
        if self.budgets and settings.budget != "full":
            body["budget"] = parse_budget(settings.budget)
        else:
            body["quality"] = "high"
        if settings.guidance == "ccfg" and settings.scale != 1:
            body["guidance_budget"] = parse_budget(settings.guidance_budget)
        try:
            answer = json.loads(self.client.ask("/v1/images/generations", body, stop))
        except ValueError:
            if stop is not None and stop.is_set():
                raise Cancelled from None
            raise
        report = answer["elit"]
        image = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))).convert("RGB")
        pixels = from_pictures([image])
        ms = report["queue_ms"] + report["compute_ms"]
        self._measured[settings] = ms
        file = io.BytesIO()
        sheet_frames(pixels, ".png")[0].save(file, format="PNG")
        return Picture(settings, file.getvalue(), ".png", pixels[0], (), ms, report["gflops"])

    def thumbnails(self, settings: SampleSettings) -> list[Image.Image]:
        """None: see `has_thumbnails`."""
        return []
