"""Pictures of the page: drawn by an engine, one run at a time, with the cost and expected quality of their settings.

Nothing here opens a path that comes from the page: a picture is named by its settings.
"""

import contextlib
import io
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from elit.budgets import resolve_budget, schedule_budgets
from elit.flow.guidance import CFG
from elit.flow.solver import time_grid
from elit.planner.choose import check_table, find_profile, network_folder, plan
from elit.planner.plan import Plan
from elit.planner.profile import measure_profile
from elit.planner.quality import find_table, read_quality
from elit.play.request import Request
from elit.sampling.engine import Engine, NetworkEngine, NetworkRun
from elit.sampling.pictures import encode_picture, sheet_frames
from elit.sampling.record import Subject, make_record
from elit.sampling.settings import Sampling

State = tuple[float, Tensor]
"""t, and the network's state (1, C, ...)."""
Tick = Callable[[int, int], None]
"""Called before every step with the number of steps done and of all steps; may raise `Cancelled`."""
DEFAULT_STEPS = 16
MAX_THUMBNAILS, THUMBNAIL_STEPS, THUMBNAIL_BUDGET = 32, 8, 0.25
PROFILE_SECONDS = 12.0
"""Time to measure this machine for a plan, in at least three rounds."""


class Cancelled(Exception):
    """The visitor stopped the run."""


@dataclass(frozen=True)
class Picture:
    """The result of a run."""

    request: Request
    file: bytes
    """As `elit sample` writes it, settings inside."""
    suffix: str
    states: tuple[State, ...]
    """A network's before every step, and the sample at t = 1; empty for other engines."""
    ms: float
    gflops: float

    def image(self) -> Image.Image:
        """The file's picture; of a clip the first frame."""
        return Image.open(io.BytesIO(self.file)).convert("RGB")


class Cost(NamedTuple):
    """Cost and expected quality of settings."""

    gflops: float
    full_gflops: float  # at all latents, all else equal
    predicted_ms: float | None  # by the profile of this machine
    measured_ms: float | None  # of the last run at such settings
    metric: str | None  # of the sweep's table
    quality: float | None  # by that table, where it has comparable settings


class Renderer:
    """An engine behind a lock, with the profile and the sweep table of its network, if it has them."""

    def __init__(self, engine: Engine, dtype: str | None = None):
        """dtype: of the network, as downloaded pictures record it. Raises ValueError for samples without pixels."""
        if not engine.makes_pictures:
            raise ValueError(f"cannot show samples of {engine.name!r}: they are latents; set --vae")
        self.engine, self.lock = engine, threading.Lock()
        self.network = engine.network if isinstance(engine, NetworkEngine) else None
        self.table, self.profile = None, None
        if self.network is not None:
            folder = network_folder(self.network)
            self.profile = find_profile(self.network, folder)
            if where := folder and find_table(folder):
                with contextlib.suppress(ValueError):  # a table of other weights
                    self.table, _ = check_table(read_quality(where), self.network, folder)
        self._measured: dict[Sampling, float] = {}
        self._thumbnails: list[tuple[Image.Image, str]] | None = None
        self.start = Request(engine.classes[0] if engine.classes else engine.example, self._start(dtype))
        engine.gflops(self.start.sampling)  # a pipeline runs its text encoder the first time

    @property
    def shows_classes(self) -> bool:
        return self.engine.network is not None and 0 < len(self.engine.classes) <= MAX_THUMBNAILS

    def draw(self, request: Request, tick: Tick = lambda done, total: None) -> Picture:
        """One picture; waits for the run before it. Raises ValueError."""
        sampling = request.sampling
        with self.lock:
            pixels, states, ms = self._sample([request.condition], [sampling.seed], sampling, tick)
        suffix = ".gif" if self.engine.clips else ".png"
        file = encode_picture(sheet_frames(pixels, suffix), suffix, self._record(request))
        self._measured[self._work(sampling)] = ms
        return Picture(request, file, suffix, tuple(states), ms, self.engine.gflops(sampling))

    def thumbnails(self) -> list[tuple[Image.Image, str]]:
        """A picture of every class with its name, drawn once; none where there are too many classes."""
        classes = self.engine.classes if self.shows_classes else ()
        with self.lock:
            if self._thumbnails is None and classes:
                budget = THUMBNAIL_BUDGET if self.engine.budgets else None
                sampling = replace(self.start.sampling, steps=THUMBNAIL_STEPS, budget=budget)
                pixels, *_ = self._sample(classes, range(len(classes)), sampling, lambda done, total: None)
                stills = pixels[:, :, 0] if self.engine.clips else pixels
                images = [sheet_frames(still[None], ".png")[0] for still in stills]
                self._thumbnails = list(zip(images, classes, strict=True))
        return self._thumbnails or []

    def _sample(
        self, conditions: Sequence[str], seeds: Sequence[int], sampling: Sampling, tick: Tick
    ) -> tuple[Tensor, list[State], float]:
        """Pixels, a network's states on the way, and milliseconds without decoding."""
        states, start = list[State](), time.perf_counter()
        with contextlib.closing(self.engine.begin(conditions, seeds, sampling)) as run:
            while not run.done:
                tick(run.steps_done, run.total)
                if isinstance(run, NetworkRun):
                    states.append((run.t, run.x.cpu()))
                run.step()
            if isinstance(run, NetworkRun):
                states.append((1.0, run.x.cpu()))
            ms = 1e3 * (time.perf_counter() - start)
            return run.pictures(), states, ms

    def _record(self, request: Request) -> str:
        """The settings inside a picture; none for a service, whose weights are not known."""
        if self.engine.network is None:
            return ""
        of = (request.condition,)
        subject = Subject(prompts=of, count=1) if self.engine.takes_text else Subject(labels=of, count=1)
        return make_record(self.engine, request.sampling, subject).to_text()

    def cost(self, request: Request) -> Cost:
        """Raises ValueError for a class or settings that the engine does not take."""
        engine, sampling = self.engine, request.sampling
        if not engine.takes_text:  # a text's encoder may be large
            engine.conditions([request.condition])
        return Cost(
            gflops=engine.gflops(sampling),
            full_gflops=engine.gflops(replace(sampling, budget=None)),
            predicted_ms=self.profile.predict(self.network, sampling) if self.profile else None,
            measured_ms=self._measured.get(self._work(sampling)),
            metric=self.table.metric if self.table else None,
            quality=self.quality(sampling),
        )

    def quality(self, sampling: Sampling) -> float | None:
        """Quality by the sweep's table, between its measured steps; None where it has no comparable settings."""
        wanted = self._work(sampling)
        for curve in self.table.curves if self.table else ():
            if self._work(curve.sampling(sampling.steps)) == wanted:
                return curve.at(sampling.steps)
        return None

    def plan(self, gflops: float | None, ms: float | None, tick: Tick) -> Plan:
        """`elit.plan` for one of two targets; milliseconds are profiled first on a machine without a profile.

        Raises ValueError for an impossible target.
        """
        assert self.network is not None
        if ms is not None and self.profile is None:
            with self.lock:
                self.profile = measure_profile(self.network, batch_sizes=(1,), seconds=PROFILE_SECONDS, progress=tick)
        table = self.table.path if self.table else None
        return plan(self.network, cache=0.0, table=table, profile=self.profile, target_gflops=gflops, target_ms=ms)

    def _start(self, dtype: str | None) -> Sampling:
        """Settings that the page opens with: all latents, and the best measured ones with these, if there are any."""
        engine = self.engine
        full = engine.budgets[-1] if engine.budgets else None
        guidance = CFG(engine.default_scale) if engine.default_scale > 1 else None
        start = Sampling(steps=DEFAULT_STEPS, budget=full, guidance=guidance, dtype=dtype)
        if self.table is None:
            return start
        settings = {self.table.loss(curve.values[-1]): curve.sampling(curve.steps[-1]) for curve in self.table.curves}
        for _, best in sorted(settings.items(), key=lambda each: each[0]):
            if not best.cache and set(self.step_budgets(best)) == {full}:
                return replace(start, steps=best.steps, guidance=best.guidance)
        return start

    def step_budgets(self, sampling: Sampling) -> list[int | None]:
        """The latents of every step."""
        return schedule_budgets(sampling.budget, time_grid(sampling.steps)[:-1], self.engine.budgets)

    def _work(self, sampling: Sampling) -> Sampling:
        """Settings reduced to what time and quality depend on, budgets as latents of every step."""
        guidance = sampling.guidance
        if guidance is not None and guidance.scale == 1:
            guidance = None
        elif guidance is not None and guidance.budget is not None:
            guidance = replace(guidance, budget=resolve_budget(guidance.budget, self.engine.budgets))
        budget = tuple(self.step_budgets(sampling))
        return replace(sampling, budget=budget, guidance=guidance, seed=0, dtype=None)
