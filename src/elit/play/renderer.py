"""Pictures of the page, named by their settings and no path: drawn one at a time, with cost and expected quality."""

import contextlib
import io
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from torch import Tensor

from elit.budgets import evenly_spaced, resolve_budget, schedule_budgets
from elit.config import require
from elit.evaluate.inspect.attention import read_attention
from elit.flow.guidance import CCFG, CFG, make_guidance
from elit.flow.solver import time_grid
from elit.planner.choose import Plan, find_profile, network_folder, plan
from elit.planner.profile import measure_profile
from elit.planner.quality import open_quality
from elit.sampling.autoencoders import decode
from elit.sampling.engine import Engine, NetworkEngine, NetworkRun
from elit.sampling.pictures import Subject, encode_picture, image_grid, make_record, sheet_frames
from elit.sampling.settings import STEPS, Sampling

State = tuple[float, Tensor]  # t, and the network's state (1, C, ...).
Tick = Callable[[int, int], None]  # Called before every step with (done, all steps); may raise `Cancelled`.
MAX_THUMBNAILS, THUMBNAIL_STEPS, THUMBNAIL_BUDGET = 32, 8, 0.25
PROFILE_SECONDS = 12.0  # Time to measure this machine for a plan, in at least three rounds.
FRAMES = 9
SIDE = 384  # Pixels of the longer side to which pictures are enlarged, by whole factors.
WARM = (255, 106, 0)
MAX_STEPS, MAX_SEED, MAX_SCALE, MAX_PROMPT, DEFAULT_SCALE = 64, 2**31 - 1, 8, 2000, 1.5
CONTROLS = ("of", "seed", "latents", "schedule", "steps", "guidance", "scale", "guidance_budget")


class Cancelled(Exception):
    """The visitor stopped the run."""


@dataclass(frozen=True)
class Request:
    """A class or prompt, and how to sample it. Raises ValueError beyond the page's limits."""

    condition: str
    sampling: Sampling

    def __post_init__(self) -> None:
        sampling, length = self.sampling, len(self.condition)
        scale = sampling.guidance.scale if sampling.guidance else 1.0
        require(self.condition.strip() != "", "the class or prompt", self.condition, "a text")
        require(length <= MAX_PROMPT, "the prompt", f"{length} characters", f"at most {MAX_PROMPT} characters")
        require(0 <= sampling.seed <= MAX_SEED, "seed", sampling.seed, f"0 to {MAX_SEED}")
        require(1 <= sampling.steps <= MAX_STEPS, "steps", sampling.steps, f"1 to {MAX_STEPS}")
        require(0 <= scale <= MAX_SCALE, "scale", scale, f"0 to {MAX_SCALE}")

    def updated(self, values: Mapping[str, object]) -> "Request":
        """This request with the values of a link. Raises ValueError."""
        new: dict[str, Any] = self.values() | dict(values)
        for name, kind in (("scale", float), ("seed", int), ("steps", int)):
            try:
                new[name] = kind(str(new[name]))
            except ValueError:
                raise ValueError(f"{name} must be of type {kind.__name__}, got {new[name]!r}") from None
        guidance = make_guidance(str(new["guidance"]), new["scale"], str(new["guidance_budget"]))
        budget = None if self.sampling.budget is None else new["budget"]  # None for a baseline
        settings = {"seed": new["seed"], "steps": new["steps"], "budget": budget, "guidance": guidance}
        return Request(str(new["of"]), replace(self.sampling, **settings))

    def values(self) -> dict[str, Any]:
        """The values of a link, by the names of `Sampling.to_dict`."""
        values = {"scale": DEFAULT_SCALE, "guidance_budget": 1} | self.sampling.to_dict()
        names = ("seed", "budget", "steps", "guidance", "scale", "guidance_budget")
        return {"of": self.condition} | {name: values[name] for name in names}

    def updated_by_controls(self, controls: Sequence[object]) -> "Request":
        """This request with the values of the controls, in the order of `CONTROLS`. Raises ValueError."""
        values = {name: "" if value is None else value for name, value in zip(CONTROLS, controls, strict=True)}
        latents, schedule = values.pop("latents"), values.pop("schedule")
        return self.updated(values | {"budget": schedule or latents})

    def controls(self, budgets: Sequence[int]) -> list[object]:
        """The values of the controls. Raises ValueError for a budget that the network does not have."""
        values, guidance = self.values(), self.sampling.guidance
        latents = schedule_budgets(self.sampling.budget, [1.0], budgets)[0] or 1
        schedule = values["budget"] if "@" in values["budget"] else ""
        weak = budgets[0] if budgets else 1
        if guidance is not None and guidance.budget is not None:
            weak = resolve_budget(guidance.budget, budgets)
        settings = [values[name] for name in ("steps", "guidance", "scale")]
        return [self.condition, values["seed"], latents, schedule, *settings, weak]


@dataclass(frozen=True)
class Picture:
    request: Request
    file: bytes  # As `elit sample` writes it, settings inside.
    suffix: str
    states: tuple[State, ...]  # A network's before every step, and the sample at t = 1; empty for other engines.
    ms: float
    gflops: float

    def image(self) -> Image.Image:
        """The file's picture; of a clip the first frame."""
        return Image.open(io.BytesIO(self.file)).convert("RGB")


class Cost(NamedTuple):
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
            with contextlib.suppress(ValueError):  # a table of other weights
                self.table = open_quality(self.network, folder)
        self._measured: dict[Sampling, float] = {}
        self._thumbnails: list[tuple[Image.Image, str]] | None = None
        full, scale = engine.budgets[-1] if engine.budgets else None, engine.default_scale
        start = Sampling(steps=STEPS, budget=full, guidance=CFG(scale) if scale > 1 else None, dtype=dtype)
        table = self.table
        for curve in sorted(table.curves, key=lambda each: table.loss(each.values[-1])) if table else ():
            best = curve.sampling(curve.steps[-1])
            if not best.cache and set(self.step_budgets(best)) == {full}:  # the best measured settings at all latents
                start = replace(start, steps=best.steps, guidance=best.guidance)
                break
        self.start = Request(engine.classes[0] if engine.classes else engine.example, start)
        engine.gflops(start)  # a pipeline runs its text encoder the first time

    @property
    def shows_classes(self) -> bool:
        return 0 < len(self.engine.classes) <= MAX_THUMBNAILS

    def draw(self, request: Request, tick: Tick = lambda done, total: None) -> Picture:
        """One picture; waits for the run before it. Raises ValueError."""
        sampling, of = request.sampling, (request.condition,)
        with self.lock:
            pixels, states, ms = self._sample(of, [sampling.seed], sampling, tick)
        subject = Subject(prompts=of, count=1) if self.engine.takes_text else Subject(labels=of, count=1)
        suffix = ".gif" if self.engine.clips else ".png"
        record = make_record(self.engine, sampling, subject).to_text()
        file = encode_picture(sheet_frames(pixels, suffix), suffix, record)
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
        """`elit.plan` for one of two targets; milliseconds without a profile are measured first. Raises ValueError."""
        assert self.network is not None
        if ms is not None and self.profile is None:
            with self.lock:
                self.profile = measure_profile(self.network, batch_sizes=(1,), seconds=PROFILE_SECONDS, progress=tick)
        table = self.table.path if self.table else None
        return plan(self.network, cache=0.0, table=table, profile=self.profile, target_gflops=gflops, target_ms=ms)

    def step_budgets(self, sampling: Sampling) -> list[int | None]:
        return schedule_budgets(sampling.budget, time_grid(sampling.steps)[:-1], self.engine.budgets)

    def _work(self, sampling: Sampling) -> Sampling:
        """Settings reduced to what time and quality depend on, budgets as latents of every step."""
        guidance = sampling.guidance if sampling.guidance and sampling.guidance.scale != 1 else None
        if guidance is not None and guidance.budget is not None:
            guidance = replace(guidance, budget=resolve_budget(guidance.budget, self.engine.budgets))
        budget = tuple(self.step_budgets(sampling))
        return replace(sampling, budget=budget, guidance=guidance, seed=0, dtype=None)


def examples(sampling: Sampling, budgets: Sequence[int], guidance_kinds: Sequence[str]) -> list[tuple[str, Sampling]]:
    if not budgets:
        return []
    low, full = budgets[0], budgets[-1]
    quarter, half = (max(low, full // parts // low * low) for parts in (4, 2))
    named = {"all latents": full, "a quarter": quarter, "the fewest": low, "half → all": f"{half}@0-0.5,{full}@0.5-1"}
    plain = replace(sampling, guidance=None)
    settings = [(name, replace(plain, budget=budget)) for name, budget in named.items()]
    if "ccfg" in guidance_kinds:
        scale = sampling.guidance.scale if sampling.guidance else 2.0
        settings.append(("CCFG", replace(plain, budget=half, guidance=CCFG(scale, low))))
    return settings


def enlarge(image: Image.Image, side: int = SIDE) -> Image.Image:
    """Enlarges by a whole factor, without smoothing, so that the network's pixels stay visible."""
    factor = max(1, side // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def difference(first: Image.Image, second: Image.Image) -> tuple[Image.Image, float]:
    """|a − b| of two pictures, white where it is largest, and the largest as a share of the range."""
    apart = ImageChops.difference(first, second)
    largest = int(np.asarray(apart).max())
    return enlarge(apart.point(lambda value: value * 255 // max(largest, 1))), largest / 255


def overlay(image: Image.Image, weights: Tensor) -> Image.Image:
    """`image` enlarged and greyed, with weights (rows, columns) >= 0 over it: warm where they are large."""
    base = enlarge(image).convert("L").convert("RGB")
    scaled = weights.float() / weights.max().clamp(min=1e-12)
    large = F.interpolate(scaled[None, None], size=(base.height, base.width), mode="nearest")[0, 0]
    alpha = Image.fromarray((large * 210).to(torch.uint8).numpy())
    return Image.composite(Image.new("RGB", base.size, WARM), base, alpha)


@torch.no_grad()
def attention_maps(engine: NetworkEngine, picture: Picture) -> tuple[list[float], Tensor]:
    """Times and maps (T, latents, rows, columns) of what is read, mean over heads; of a clip the first frame."""
    model, y = engine.network, engine.conditions([picture.request.condition])
    maps, times = [], [t for t, _ in picture.states[:-1]]
    budgets = schedule_budgets(picture.request.sampling.budget, times, engine.budgets)
    budget = max(each for each in budgets if each is not None)
    for t, x in picture.states[:-1]:
        x = x.to(model.device, model.dtype)
        maps.append(read_attention(model, x, torch.tensor([t], device=x.device), y, budget).float().cpu())
    weights = torch.cat(maps)
    return times, weights[:, :, 0] if weights.ndim == 5 else weights


@torch.no_grad()
def trajectory(engine: NetworkEngine, picture: Picture) -> list[tuple[Image.Image, str]]:
    """States of the run from noise to picture, evenly spaced over its steps, with their times."""
    states = evenly_spaced(picture.states, FRAMES)
    stills = [decode(engine.vae, x.to(engine.network.device)).float().cpu() for _, x in states]
    images = [image_grid(still[:, :, 0] if still.ndim == 5 else still, 1) for still in stills]
    return [(enlarge(image, 192), f"t = {t:.2f}") for image, (t, _) in zip(images, states, strict=True)]
