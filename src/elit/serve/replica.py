"""One replica: its queue, its policy, and the loop that steps the engine. asyncio, no Ray.

The queue is the replica's own. Ray Serve's `@serve.batch` knows neither deadlines nor priorities, sends requests that
do not fit to the back of its queue, needs a request's size before its budget is known, and lets none join a running
batch.
"""

import asyncio
import io
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from elit.budgets import evenly_spaced
from elit.files import Json
from elit.planner.cost import Costs, branch_latents
from elit.sampling.engine import Engine, Run
from elit.sampling.pictures import image_grid
from elit.sampling.settings import Sampling
from elit.serve.policy import Policy, PolicySettings, Refusal
from elit.serve.requests import Job
from elit.serve.settings import ServiceSettings

log = logging.getLogger("elit.serve")
MAX_SLOTS = 8
MAX_COSTS = 17
"""Budgets with a cost in the description; between them it is nearly linear."""
MAX_FAILURES = 3
"""Failed steps in a row after which the replica is unhealthy."""


@dataclass
class Progress:
    """A job at this replica."""

    job: Job
    answers: asyncio.Queue[Json | Exception] = field(default_factory=asyncio.Queue)
    runs: list[Run] = field(default_factory=list)
    """One an image, so that its bytes do not depend on the request's others."""
    setting: Sampling | None = None
    started: float = 0.0
    batches: list[int] = field(default_factory=list)
    """Images in progress in each of its steps."""

    def wants_preview(self) -> bool:
        steps, step, previews = self.runs[0].total, self.runs[0].steps_done, self.job.previews
        return step < steps and any(step == max(1, steps * (i + 1) // (previews + 1)) for i in range(previews))


class Replica:
    """Jobs in, pictures out. `start` its loop inside a running event loop."""

    def __init__(
        self,
        engine: Engine,
        costs: Costs,
        service: ServiceSettings,
        name: str = "0",
        *,
        ladder: Sequence[Sampling] | None = None,
        refuse: bool = True,
    ):
        """ladder: default the service's own. refuse: False serves late requests, as a plain server does."""
        self.engine, self.service, self.name = engine, service, name
        ladder = ladder or service.ladder(engine.budgets, engine.default_scale)
        slots = service.max_batch or costs.efficient_batch(ladder[0], MAX_SLOTS)
        limits = PolicySettings(slots=slots, max_queue=service.max_queue, refuse=refuse)
        self.policy = Policy(replace(costs, separate=engine.exact), len(ladder), limits)
        self.here: dict[str, Progress] = {}
        self.failures = 0
        """Failed steps in a row."""
        self._left: list[Run] = []
        """Runs without a client; everything that touches the engine is done in its thread, between two steps."""
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._loop_task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._loop_task is None:
            self._loop_task = asyncio.get_running_loop().create_task(self._run())

    def check(self) -> None:
        """Raises RuntimeError where this replica must be replaced."""
        if self.failures >= MAX_FAILURES or (self._loop_task is not None and self._loop_task.done()):
            raise RuntimeError("the engine fails")

    def describe(self) -> Json:
        """The model for its clients: size (width, height) in pixels, budgets, classes or text, and costs."""
        engine, policy = self.engine, self.policy
        return {
            "size": list(engine.size),
            "multiple": engine.multiple,
            "budgets": list(engine.budgets),
            "text": engine.takes_text,
            "classes": len(engine.classes),
            "class_names": list(engine.classes),
            "negative_prompt": engine.takes_negatives,
            "guides": "cfg" in engine.guidance_kinds,
            "step_gflops": self._step_gflops,
            "guidance_scale": engine.default_scale,
            "slots": policy.settings.slots,
            "costs": vars(policy.costs),
            "replica": self.name,
        }

    @cached_property
    def _step_gflops(self) -> list[tuple[int, float]]:
        """(latents per group, GFLOPs) of one branch of a step of one image; 0 latents without an interface."""
        counts: Sequence[int | None] = evenly_spaced(self.engine.budgets, MAX_COSTS) or [None]
        return [(count or 0, self.engine.gflops(Sampling(steps=1, budget=count))) for count in counts]

    async def generate(self, job: Job) -> Json:
        """Pictures and their settings, or {"refused", "retry_after"}, or {"invalid"}."""
        answer: Json = {}
        async for answer in self.stream(job):  # noqa: B007
            pass
        return answer

    async def stream(self, job: Job) -> AsyncGenerator[Json, None]:
        """Previews, then the answer. A client that leaves frees the job's place."""
        if refusal := self.policy.arrive(job, time.time()):
            yield refused(refusal)
            return
        progress = self.here[job.id] = Progress(job)
        self._wake.set()
        try:
            while True:
                answer = await progress.answers.get()
                if isinstance(answer, Exception):
                    raise answer
                yield answer
                if "preview" not in answer:
                    return
        finally:
            self.here.pop(job.id, None)
            self._end(progress)

    def _end(self, progress: Progress) -> None:
        """Frees the job's place; its runs are closed before the next step."""
        self.policy.leave(progress.job.id)
        self._left += progress.runs
        progress.runs = []
        self._wake.set()

    async def _run(self) -> None:
        """Decide, step, answer, for ever."""
        while True:
            while self._left:
                await self._in_thread(self._left.pop().close)
            starts, refusals = self.policy.decide(time.time())
            for refusal in refusals:
                self._answer(refusal.request.id, refused(refusal))
            for start in starts:
                if progress := self.here.get(start.request.id):  # else the client left while another request began
                    await self._begin(progress, start.setting)
            if self.policy.running:
                await self._step()
            elif not self._left:
                self._wake.clear()
                if not self.policy.waiting:
                    await self._wake.wait()

    async def _begin(self, progress: Progress, setting: Sampling) -> None:
        job, engine = progress.job, self.engine
        progress.started, progress.setting = time.time(), setting

        def begin() -> list[Run]:
            conditions, negatives = engine.conditions([job.prompt]), [job.negative_prompt]
            options: Json = {"size": job.size, "negatives": negatives}
            return [engine.begin(conditions, [seed], setting, **options) for seed in job.seeds]

        try:
            progress.runs = await self._in_thread(begin)
        except Exception as error:  # out of memory, too, is this request's alone
            self._fail(progress, error)
            return
        if job.id not in self.here:
            self._end(progress)

    async def _step(self) -> None:
        """One step of all in progress; those at their end are answered."""
        running = [progress for each in self.policy.running if (progress := self.here.get(each.request.id))]
        runs = [run for each in running for run in each.runs]
        start = time.perf_counter()
        try:
            await self._in_thread(self.engine.step, runs)
        except Exception as error:
            self.failures += 1
            for each in running:
                self._fail(each, RuntimeError("the engine failed"), cause=error)
            return
        self.failures = 0
        done = {each.request.id for each in self.policy.stepped(1e3 * (time.perf_counter() - start))}
        for each in running:
            each.batches.append(len(runs))
            if not each.runs:  # its client has left
                continue
            if error := next((run.error for run in each.runs if run.error), None):
                self._fail(each, error)
            elif each.job.id in done:
                await self._finish(each)
            elif each.job.previews and each.wants_preview():
                pixels = await self._in_thread(each.runs[0].preview)
                if pixels is not None:
                    picture = {"preview": encode(pixels, each.job.output_format), "size": self.engine.size}
                    each.answers.put_nowait(picture)

    def _fail(self, progress: Progress, error: Exception, cause: Exception | None = None) -> None:
        """Ends one request; the others go on."""
        self._end(progress)
        if isinstance(error, ValueError):
            self._answer(progress.job.id, {"invalid": " ".join(str(error).split())[:300]})
        else:
            log.error("a request failed", exc_info=cause or error)
            self._answer(progress.job.id, RuntimeError("the engine failed"))

    async def _finish(self, progress: Progress) -> None:
        runs, job, setting = progress.runs, progress.job, progress.setting
        assert setting is not None

        def finish() -> tuple[list[bytes], float]:
            pictures = [encode(run.pictures(), job.output_format) for run in runs]
            return pictures, self.engine.gflops(setting, job.size)

        try:
            pictures, gflops = await self._in_thread(finish)
        except Exception as error:  # such as memory for the autoencoder
            self._fail(progress, error)
            return
        now, guidance = time.time(), setting.guidance
        answer = {
            "images": pictures,
            "size": job.size or self.engine.size,
            "budget": branch_latents(setting)[0] or None,
            "steps": setting.steps,
            "guidance": {"scale": guidance.scale, "budget": guidance.budget} if guidance else None,
            "gflops": gflops,
            "queue_ms": 1e3 * (progress.started - job.arrival),
            "compute_ms": 1e3 * (now - progress.started),
            "batch": sum(progress.batches) / max(1, len(progress.batches)),
            "queue_length": len(self.policy.waiting),
            "replica": self.name,
        }
        self._answer(job.id, answer)

    def _answer(self, id: str, answer: Json | Exception) -> None:
        if id in self.here:  # else the client has gone
            self.here[id].answers.put_nowait(answer)

    async def _in_thread(self, run: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, run, *arguments)


def encode(pixels: Tensor, kind: str) -> bytes:
    """One picture (1, C, H, W) as a file's content."""
    content = io.BytesIO()
    image_grid(pixels, 1).save(content, format=kind.upper())
    return content.getvalue()


def refused(refusal: Refusal) -> Json:
    return {"refused": refusal.reason, "retry_after": refusal.retry_after}
