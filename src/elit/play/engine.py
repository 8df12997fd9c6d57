"""What makes the page's pictures: a network in this process, one run at a time, with what its settings cost.

Nothing here knows of the page, and nothing that comes from it is opened as a path: a picture is named by its settings.
"""

import io
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from diffusers import ModelMixin
from PIL import Image
from torch import Tensor

from elit.budgets import resolve_budget, schedule_budgets
from elit.elastic.load import load_network
from elit.flow.guidance import Guidance
from elit.flow.solver import time_grid
from elit.models.text import CHARACTERS
from elit.models.transformer import Transformer
from elit.planner.choose import find_profile, network_folder
from elit.planner.profile import Profile
from elit.planner.quality import Curve, Quality, find_table, read_quality
from elit.sampling.draw import as_pixels, conditions_of, draw, environment_of, weights_fingerprint
from elit.sampling.evaluations import sampling_flops
from elit.sampling.pictures import encode_picture, sheet_frames
from elit.sampling.settings import SampleRecord, SampleSettings, Sampling

Tick = Callable[[int, int], None]
"""Steps done, steps in all."""


class Cancelled(Exception):
    """The run was asked to stop."""


@dataclass(frozen=True)
class Picture:
    """What a run made."""

    settings: SampleSettings
    file: bytes
    """As `elit sample` writes it, settings inside."""
    suffix: str
    pixels: Tensor
    """(C, H, W) or (C, T, H, W) in [-1, 1], on the CPU."""
    states: tuple[tuple[float, Tensor], ...]
    """(t, x): the network's state (1, C, ...) before every step, and the sample itself at t = 1."""
    ms: float
    gflops: float

    def image(self) -> Image.Image:
        """As the file shows it; of a clip the first frame."""
        return Image.open(io.BytesIO(self.file)).convert("RGB")


@dataclass(frozen=True)
class Cost:
    """What settings cost and how good they are expected to be."""

    gflops: float
    full_gflops: float
    """At all latents, all else equal."""
    predicted_ms: float | None
    """By the profile of this machine; None without one."""
    measured_ms: float | None
    """Of the last run at such settings; None before one."""
    metric: str | None
    quality: float | None
    """By the sweep's table; None where it has nothing of the like."""


class PageEngine(Protocol):
    """What the page asks of whatever makes its pictures."""

    name: str
    dtype: str
    has_thumbnails: ClassVar[bool]
    lock: threading.Lock

    @property
    def takes_text(self) -> bool: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def budgets(self) -> tuple[int, ...]: ...
    @property
    def guidances(self) -> tuple[str, ...]: ...
    @property
    def start(self) -> dict[str, Any]: ...
    def check(self, settings: SampleSettings) -> None: ...
    def cost(self, settings: SampleSettings) -> Cost: ...
    def generate(
        self, settings: SampleSettings, tick: Tick | None = None, stop: threading.Event | None = None
    ) -> Picture: ...
    def thumbnails(self, settings: SampleSettings) -> list[Image.Image]: ...


@dataclass
class NetworkEngine:
    """An elit network, with its autoencoder if it has one.

    name: as it is recorded in pictures. device: the network's.
    """

    name: str
    model: Transformer
    vae: ModelMixin | None = None
    dtype: str = "float32"
    table: Quality | None = None
    profile: Profile | None = None
    can_look_inside: bool = True
    has_thumbnails: ClassVar[bool] = True
    _measured: dict[Any, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while the network runs."""

    def __post_init__(self) -> None:
        self.weights = weights_fingerprint(self.model)
        self.environment = environment_of(self.model.device)
        self.can_look_inside = self.model.latent_interface is not None
        pictures = self.vae is not None or self.model.config.in_channels in (1, 3)
        if not pictures:
            raise ValueError(f"model={self.name!r}: its samples are no pictures; give the autoencoder with --vae")

    @classmethod
    def load(cls, name: str, *, vae: Path | None, device: str, dtype: str) -> "NetworkEngine":
        """A saved network or pipeline, with its sweep's table and its profile if they are beside it."""
        precision = getattr(torch, dtype)
        model, autoencoder = load_network(name, vae=vae, device=device, dtype=precision)
        if not isinstance(model, Transformer):
            kind = type(model).__name__
            raise ValueError(f"model={name!r}: an elastified {kind} alone; give the folder of its pipeline")
        folder = network_folder(name)
        where = folder and find_table(folder)
        return cls(
            name=name,
            model=model,
            vae=autoencoder,
            dtype=dtype,
            table=read_quality(where) if where else None,
            profile=find_profile(model, folder),
        )

    @property
    def takes_text(self) -> bool:
        return self.model.takes_text

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, their numbers where they have none; empty for a network that takes text."""
        if self.takes_text:
            return ()
        names = self.model.config.get("class_names")
        return tuple(names) if names else tuple(map(str, range(self.model.config.num_classes)))

    @property
    def budgets(self) -> tuple[int, ...]:
        return self.model.budgets

    @property
    def guidances(self) -> tuple[str, ...]:
        """Kinds of guidance that can be chosen."""
        return ("none", "cfg", "ag", "ccfg") if self.budgets else ("none", "cfg")

    @property
    def start(self) -> dict[str, Any]:
        """Where the dial stands at first, beside all latents."""
        return {"condition": "a handwritten seven" if self.takes_text else self.classes[0]}

    @property
    def clips(self) -> bool:
        return len(self.model.sample_size) == 3

    def check(self, settings: SampleSettings) -> None:
        """Raises ValueError, in one line, for a class or prompt that this network does not take."""
        if not self.takes_text or self.model.config.text_encoder == CHARACTERS:  # others would load their encoder
            conditions_of(self.model, settings.labels, settings.prompts, settings.text_encoder)

    def gflops(self, settings: SampleSettings) -> float:
        return sampling_flops(self.model, **settings.arguments()) / 1e9

    def cost(self, settings: SampleSettings) -> Cost:
        """Raises ValueError for settings that this network does not take."""
        gflops = self.gflops(settings)
        full = replace(settings, budget="full") if settings.guidance != "ag" else settings
        predicted = None
        if self.profile is not None and settings.solver == "euler":
            arguments = {name: settings.arguments()[name] for name in ("steps", "budget", "guidance", "cache")}
            predicted = self.profile.predict(self.model, Sampling(**arguments))
        quality = self.quality(settings)
        return Cost(
            gflops=gflops,
            full_gflops=self.gflops(full),
            predicted_ms=predicted,
            measured_ms=self._measured.get(self._work(settings)),
            metric=self.table.metric if self.table else None,
            quality=quality,
        )

    def quality(self, settings: SampleSettings) -> float | None:
        """By the sweep's table, between its measured steps; None where nobody measured the like."""
        if self.table is None or settings.solver != "euler" or settings.shift != 1:
            return None
        wanted = self._step_budgets(settings), self._guide(settings.guide())
        for curve in self.table.curves:
            budget = "full" if curve.setting.budget is None else str(curve.setting.budget)
            measured = self._step_budgets(replace(settings, budget=budget)), self._guide(curve.setting.guidance)
            if measured == wanted and curve.setting.cache == settings.cache:
                return curve.at(settings.steps)
        return None

    def curve_gflops(self, curve: Curve, steps: int) -> float:
        """Of a measured setting of a sweep."""
        setting = curve.setting
        options: dict[str, Any] = {"budget": setting.budget, "guidance": setting.guidance, "cache": setting.cache}
        return sampling_flops(self.model, steps=steps, **options) / 1e9

    def generate(
        self, settings: SampleSettings, tick: Tick | None = None, stop: threading.Event | None = None
    ) -> Picture:
        """One picture. Waits for the run before it. Raises ValueError, and `Cancelled` once `stop` is set."""
        conditions = conditions_of(self.model, settings.labels, settings.prompts, settings.text_encoder)
        gflops = self.gflops(settings)
        states: list[tuple[float, Tensor]] = []

        def on_step(step: int, t: float, x: Tensor) -> None:
            if stop is not None and stop.is_set():
                raise Cancelled
            states.append((t, x.cpu()))
            if tick:
                tick(step, settings.steps)

        with self.lock:
            start = time.perf_counter()
            x = draw(self.model, settings, conditions=conditions, on_step=on_step)
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            ms = 1e3 * (time.perf_counter() - start)
            pixels = as_pixels(x, self.vae, 1).float().cpu()
        states.append((1.0, x.cpu()))
        self._measured[self._work(settings)] = ms
        suffix = ".gif" if self.clips else ".png"
        record = SampleRecord(model=self.name, weights=self.weights, settings=settings, made_with=self.environment)
        file = encode_picture(sheet_frames(pixels, suffix), suffix, record.to_text())
        return Picture(settings, file, suffix, pixels[0], tuple(states), ms, gflops)

    def thumbnails(self, settings: SampleSettings) -> list[Image.Image]:
        """A picture of every class in one run, which also warms the network up."""
        with self.lock:
            x = draw(self.model, replace(settings, labels=self.classes, count=len(self.classes)))
            pixels = as_pixels(x, self.vae, len(x)).float().cpu()
        return [sheet_frames(image[None], ".png")[0] for image in (pixels[:, :, 0] if self.clips else pixels)]

    def _step_budgets(self, settings: SampleSettings) -> tuple[int | None, ...]:
        times = time_grid(settings.steps, settings.shift)[:-1]
        return tuple(schedule_budgets(settings.arguments()["budget"], times, self.model.budgets))

    def _guide(self, guidance: Guidance | None) -> Any:
        """Guidance, its budget resolved; None where it changes nothing."""
        if guidance is None or guidance.scale == 1:
            return None
        weak = resolve_budget(guidance.budget, self.model.budgets) if guidance.budget is not None else None
        return replace(guidance, budget=weak)

    def _work(self, settings: SampleSettings) -> Any:
        """What a run's time depends on."""
        weak = settings.guidance_budget if settings.guidance in ("ag", "ccfg") else None
        interval = settings.guidance_interval if settings.guidance != "none" else None
        off = settings.guidance == "none" or settings.scale == 1
        guidance = not off and settings.guidance
        return self._step_budgets(settings), guidance, weak, interval, settings.solver, settings.cache
