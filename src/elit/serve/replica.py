"""One replica: its queue, its policy, and the loop that steps the engine. asyncio and torch, no Ray.

The queue is the replica's own. Ray Serve's `@serve.batch` knows neither deadlines nor priorities, sends what does not
fit to the back of its queue, asks for a request's size before its budget is known, and lets none join a running batch.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from elit.planner.cost import Costs
from elit.sampling.settings import Sampling
from elit.serve.engine import Engine, Images
from elit.serve.policy import Policy, PolicySettings, Refusal, Request
from elit.serve.requests import Job
from elit.serve.settings import ServiceSettings

if TYPE_CHECKING:  # diffusers' pipelines take seconds to import
    from elit.serve.pipeline_engine import PipelineEngine, PipelineImages

log = logging.getLogger("elit.serve")
MOST_SLOTS = 8


@dataclass
class Progress:
    """A job here, and how it gets on."""

    job: Job
    answers: asyncio.Queue[dict[str, Any] | Exception] = field(default_factory=asyncio.Queue)
    images: "Images | PipelineImages | None" = None
    started: float = 0.0
    batches: list[int] = field(default_factory=list)
    """Images in progress in each of its steps."""

    def wants_preview(self) -> bool:
        assert self.images is not None
        steps, step, previews = self.images.setting.steps, self.images.step, self.job.previews
        return step < steps and any(step == max(1, steps * (i + 1) // (previews + 1)) for i in range(previews))


class Replica:
    """Jobs in, pictures out. `start` its loop inside a running event loop."""

    def __init__(
        self,
        engine: "Engine | PipelineEngine",
        costs: Costs,
        service: ServiceSettings,
        name: str = "0",
        *,
        ladder: Sequence[Sampling] | None = None,
    ):
        """ladder: default the service's own."""
        self.engine: Any = engine
        self.service, self.name = service, name
        ladder = ladder or service.ladder(engine.budgets, engine.describe()["guidance_scale"])
        slots = service.max_batch or costs.efficient_batch(ladder[0], MOST_SLOTS)
        own = PolicySettings(slots=slots, max_queue=service.max_queue, refuse=service.refuse)
        self.policy = Policy(costs, len(ladder), own)
        self.here: dict[str, Progress] = {}
        self._left: list[Any] = []
        """Images that nobody waits for any more; all that touches the engine runs in its thread, between two steps."""
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._loop_task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._loop_task = asyncio.get_running_loop().create_task(self._run())

    def describe(self) -> dict[str, Any]:
        return self.engine.describe()

    def check(self) -> None:
        """Raises RuntimeError where the loop has ended: this replica must be replaced."""
        if self._loop_task is not None and self._loop_task.done():
            raise RuntimeError("the engine's loop has ended")

    async def generate(self, job: Job) -> dict[str, Any]:
        """Pictures and how they were made, or {"refused", "retry_after"}, or {"invalid"}."""
        answer: dict[str, Any] = {}
        async for answer in self.stream(job):  # noqa: B007
            pass
        return answer

    async def stream(self, job: Job) -> AsyncGenerator[dict[str, Any], None]:
        """Previews, then the answer. Whoever stops listening frees the job's place."""
        now = time.time()
        request = Request(
            id=job.id,
            arrival=job.arrival,
            deadline=job.deadline,
            settings=job.settings,
            first=job.first,
            images=len(job.seeds),
        )
        if refusal := self.policy.arrive(request, now):
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
            self.policy.leave(job.id)
            if progress.images is not None:
                self._left.append(progress.images)
                self._wake.set()

    async def _run(self) -> None:
        """Decide, step, answer, for ever."""
        while True:
            while self._left:
                await self._in_thread(self.engine.leave, self._left.pop())
            decision = self.policy.decide(time.time())
            for refusal in decision.refused:
                self._answer(refusal.request.id, refused(refusal))
            for request, setting in decision.starts:
                progress = self.here[request.id]
                progress.started = time.time()
                job = progress.job
                try:
                    begin = partial(self.engine.begin, size=job.size, negative=job.negative_prompt)
                    progress.images = await self._in_thread(begin, job.prompt, job.seeds, setting)
                except ValueError as error:
                    self.policy.leave(request.id)
                    self._answer(request.id, {"invalid": " ".join(str(error).split())})
            if not self.policy.running:
                self._wake.clear()
                if not self.policy.waiting:
                    await self._wake.wait()
                continue
            await self._step()

    async def _step(self) -> None:
        """One step of all in progress; those at their end are answered."""
        running = [self.here[each.request.id] for each in self.policy.running]
        images = [each.images for each in running if each.images is not None]
        busy = sum(each.count for each in images)
        start = time.perf_counter()
        try:
            await self._in_thread(self.engine.step, images)
        except Exception:
            log.exception("a step failed")
            for each in running:
                self.policy.leave(each.job.id)
                self._answer(each.job.id, RuntimeError("the engine failed"))
            return
        done = {each.request.id for each in self.policy.stepped(1e3 * (time.perf_counter() - start))}
        for each in running:
            each.batches.append(busy)
            if each.images is None or each.job.id not in self.here:
                continue
            if each.images.error is not None:
                self._fail(each, each.images.error)
                continue
            if each.job.id in done:
                await self._finish(each)
            elif each.job.previews and self.engine.has_previews and each.wants_preview():
                picture = await self._in_thread(self.engine.preview, each.images, each.job.output_format)
                each.answers.put_nowait({"preview": picture, "size": self.engine.size})

    def _fail(self, progress: Progress, error: Exception) -> None:
        """Ends one request; the others go on."""
        self.policy.leave(progress.job.id)
        if isinstance(error, ValueError):
            self._answer(progress.job.id, {"invalid": " ".join(str(error).split())[:300]})
        else:
            log.error("a request failed", exc_info=error)
            self._answer(progress.job.id, RuntimeError("the engine failed"))

    async def _finish(self, progress: Progress) -> None:
        images, job = progress.images, progress.job
        assert images is not None
        try:
            pictures = await self._in_thread(self.engine.finish, images, job.output_format)
            gflops = await self._in_thread(self.engine.gflops, images.setting, job.size)
        except Exception as error:  # such as memory for the autoencoder
            self._fail(progress, error)
            return
        setting, now = images.setting, time.time()
        guidance = {"scale": setting.guidance.scale, "budget": setting.guidance.budget} if setting.guidance else None
        self._answer(
            job.id,
            {
                "images": pictures,
                "size": job.size or self.engine.size,
                "budget": setting.budget,
                "steps": setting.steps,
                "guidance": guidance,
                "gflops": gflops,
                "queue_ms": 1e3 * (progress.started - job.arrival),
                "compute_ms": 1e3 * (now - progress.started),
                "batch": sum(progress.batches) / max(1, len(progress.batches)),
                "queue_length": len(self.policy.waiting),
                "level": self.policy.level,
                "slowdown": self.policy.slowdown,
                "replica": self.name,
            },
        )

    def _answer(self, id: str, answer: dict[str, Any] | Exception) -> None:
        if id in self.here:  # else the client has gone
            self.here[id].answers.put_nowait(answer)

    async def _in_thread(self, run: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, run, *arguments)


def refused(refusal: Refusal) -> dict[str, Any]:
    return {"refused": refusal.reason, "retry_after": refusal.retry_after}


def load_replica(service: ServiceSettings, name: str = "0") -> Replica:
    """The engine on this machine, its costs from a profile or measured now. Raises ValueError."""
    import torch

    from elit.elastic.load import is_stock_pipeline
    from elit.planner.choose import find_profile, network_folder
    from elit.planner.profile import read_profile
    from elit.pretrained import measurements_folder, model_folder

    if service.threads:
        torch.set_num_threads(service.threads)
    dtype, device = getattr(torch, service.dtype), service.device or "cpu"
    engine: Engine | PipelineEngine
    costs = None
    if is_stock_pipeline(service.model):
        engine = _load_pipeline(service, dtype)
    else:
        engine = Engine(service.model, device=device, dtype=dtype, compile=service.compile, exact=service.exact)
        if service.pixels() not in (None, engine.size):
            raise ValueError(f"size={service.size}: this model makes {engine.size[0]}x{engine.size[1]}")
        folder = network_folder(model_folder(service.model))
        profile = find_profile(engine.model, folder and measurements_folder(folder), compile=service.compile)
        if profile is not None and profile.anatomy:
            costs = profile.costs()
    if service.profile:
        costs = read_profile(service.profile).costs()
    costs = costs or engine.measure()
    return Replica(engine, replace(costs, separate=engine.exact), service, name)


def _load_pipeline(service: ServiceSettings, dtype: Any) -> "PipelineEngine":
    from elit.elastic.stock import StockPipeline, find_stock
    from elit.serve.pipeline_engine import PipelineEngine

    stock = find_stock(service.model)
    assert stock is not None
    pipe = StockPipeline.load(stock, device=service.device or "cpu", dtype=dtype)
    if service.compile:
        pipe.transformer.compile()
    return PipelineEngine(pipe, exact=service.exact, size=service.pixels())
