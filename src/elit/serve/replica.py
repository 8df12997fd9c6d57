"""One replica: its queue, its policy, and the loop that steps the engine. asyncio, no Ray."""

import asyncio
import logging
import math
import statistics
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from elit.elastic.engine import load_engine
from elit.files import Json
from elit.planner.choose import find_profile, network_folder
from elit.planner.cost import Costs, branch_latents
from elit.planner.profile import read_profile
from elit.pretrained import measurements_folder, model_folder
from elit.sampling.engine import Engine, NetworkEngine, Run
from elit.sampling.pictures import encode_picture, sheet_frames
from elit.sampling.settings import Sampling
from elit.serve.ladder import Step, fit_steps, measure_costs
from elit.serve.policy import Policy, PolicySettings, Running
from elit.serve.requests import Request
from elit.serve.settings import ServiceSettings, parse_size

log = logging.getLogger("elit.serve")
MAX_SLOTS = 8
STAGES = ("queue", "begin", "steps", "pictures")  # A request's, one after the other.
REFIT = 64  # Steps after which the costs are fitted to them.
MAX_FAILURES = 3  # Failed steps in a row after which the replica is unhealthy.


@dataclass
class Progress:
    """A request at this replica."""

    request: Request
    answers: asyncio.Queue[Json | Exception] = field(default_factory=asyncio.Queue)
    runs: list[Run] = field(default_factory=list)  # one an image, so that its bytes do not depend on the others
    started: float = 0.0  # when its beginning, its steps and its pictures were
    stepped: float = 0.0
    batches: list[int] = field(default_factory=list)  # images in progress in each of its steps

    def wants_preview(self) -> bool:
        steps, step, previews = self.runs[0].total, self.runs[0].steps_done, self.request.previews
        return step < steps and any(step == max(1, steps * (i + 1) // (previews + 1)) for i in range(previews))


class Replica:
    """Requests in, pictures out, by a loop inside the running event loop."""

    def __init__(self, engine: Engine, costs: Costs, service: ServiceSettings, name: str = "0"):
        self.engine, self.name = engine, name
        ladder = service.ladder(engine.budgets, engine.default_scale)
        slots = service.max_batch or costs.efficient_batch(ladder[0], MAX_SLOTS)
        limits = PolicySettings(slots=slots, max_queue=service.max_queue)
        self.policy = Policy(replace(costs, separate=engine.exact), len(ladder), limits)
        self.here: dict[str, Progress] = {}
        self.failures = 0  # failed steps in a row
        self.steps = list[Step]()  # since the costs were fitted
        self.beside = deque([self.policy.costs.image], maxlen=REFIT)  # ms of images beside their steps
        self._left: list[Run] = []  # runs without a client, closed in the engine's thread between two steps
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._loop_task: asyncio.Task[None] | None = None

    async def alive(self) -> None:
        """Raises RuntimeError where this replica must be replaced."""
        if self.failures >= MAX_FAILURES or (self._loop_task is not None and self._loop_task.done()):
            raise RuntimeError("the engine fails")

    async def describe(self) -> Json:
        """The model for its clients: size (width, height) in pixels, budgets, classes or text."""
        engine = self.engine
        return {
            "size": list(engine.size),
            "multiple": engine.multiple,
            "budgets": list(engine.budgets),
            "text": engine.takes_text,
            "classes": len(engine.classes),
            "class_names": list(engine.classes),
            "negative_prompt": engine.takes_negatives,
            "guides": "cfg" in engine.guidance_kinds,
            "guidance_scale": engine.default_scale,
            "costs": vars(self.policy.costs),
        }

    async def generate(self, request: Request) -> Json:
        """Pictures and their settings, or {"refused", "retry_after"}, or {"invalid"}."""
        answer: Json = {}
        async for answer in self.stream(request):  # noqa: B007
            pass
        return answer

    async def stream(self, request: Request) -> AsyncGenerator[Json, None]:
        """Previews, then the answer. A client that leaves frees its place."""
        if self._loop_task is None:
            self._loop_task = asyncio.get_running_loop().create_task(self._run())
        if refusal := self.policy.arrive(request, time.time()):
            least = f"deadline_ms must be {math.ceil(1e3 * refusal.retry_after)} or more for such a request"
            late = {"refused": refusal.reason, "retry_after": refusal.retry_after}
            yield {"invalid": least} if refusal.reason == "impossible" else late
            return
        progress = self.here[request.id] = Progress(request)
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
            self.here.pop(request.id, None)
            self._end(progress)

    def _end(self, progress: Progress) -> None:
        """Frees the request's place; its runs are closed before the next step."""
        self.policy.leave(progress.request.id)
        self._left += progress.runs
        progress.runs = []
        self._wake.set()

    async def _run(self) -> None:
        while True:
            while self._left:
                await self._in_thread(self._left.pop().close)
            starts, refusals = self.policy.decide(time.time())
            for refusal in refusals:
                self._answer(refusal.request, {"refused": refusal.reason, "retry_after": refusal.retry_after})
            for start in starts:
                if progress := self.here.get(start.request.id):  # else the client left while another request began
                    await self._begin(progress, start.setting)
            if self.policy.running:
                await self._step()
            elif not self._left and not self.policy.waiting:
                self._wake.clear()
                await self._wake.wait()

    async def _begin(self, progress: Progress, setting: Sampling) -> None:
        request = progress.request
        progress.started = time.time()

        def begin() -> list[Run]:
            conditions = self.engine.conditions([request.prompt])
            options: Json = {"size": request.size, "negatives": [request.negative_prompt]}
            return [self.engine.begin(conditions, [seed], setting, **options) for seed in request.seeds]

        try:
            progress.runs = await self._in_thread(begin)
        except Exception as error:  # out of memory, too, is this request's alone
            self._fail(progress, error)
            return
        progress.stepped = time.time()
        if request.id not in self.here:  # its client has left meanwhile
            self._end(progress)

    async def _step(self) -> None:
        """One step of all in progress; those at their end are answered."""
        running = [(each, found) for each in self.policy.running if (found := self.here.get(each.request.id))]
        runs = [run for _, progress in running for run in progress.runs]
        start = time.perf_counter()
        try:
            await self._in_thread(self.engine.step, runs)
        except Exception as error:
            self.failures += 1
            for _, progress in running:
                self._fail(progress, error, ours=True)
            return
        self.failures = 0
        ms = 1e3 * (time.perf_counter() - start)
        done = self.policy.stepped(ms)
        self.steps.append(([(each.setting, each.request.images) for each, _ in running], ms))
        if len(self.steps) >= REFIT:
            self._refit()
        for each, progress in running:
            progress.batches.append(len(runs))
            if not progress.runs:  # its client has left
                continue
            if error := next((run.error for run in progress.runs if run.error), None):
                self._fail(progress, error)
            elif each in done:
                await self._finish(progress, each)
            elif progress.wants_preview():
                pixels = await self._in_thread(progress.runs[0].preview)
                if pixels is not None:
                    preview = encode(pixels, progress.request.output_format)
                    self._answer(progress.request, {"preview": preview, "size": self.engine.size})

    def _refit(self) -> None:
        """Fits the costs to the last steps, whatever they were at the start."""
        policy, steps, self.steps = self.policy, self.steps, []
        costs = fit_steps(policy.costs, steps, policy.slowdown)
        policy.slowdown = statistics.median(ms / costs.step_ms(running) for running, ms in steps[-REFIT // 4 :])
        policy.costs = replace(costs, image=statistics.median(self.beside) / policy.slowdown)

    def _fail(self, progress: Progress, error: Exception, *, ours: bool = False) -> None:
        """Ends one request; the others go on. A ValueError is the request's fault, unless it is `ours`."""
        self._end(progress)
        if isinstance(error, ValueError) and not ours:
            self._answer(progress.request, {"invalid": " ".join(str(error).split())[:300]})
        else:
            log.error("a request failed", exc_info=error)
            self._answer(progress.request, RuntimeError("the engine failed"))

    async def _finish(self, progress: Progress, running: Running) -> None:
        runs, request, setting = progress.runs, progress.request, running.setting
        times = [request.arrival, progress.started, progress.stepped, time.time()]

        def finish() -> tuple[list[bytes], float]:
            pictures = [encode(run.pictures(), request.output_format) for run in runs]
            return pictures, self.engine.gflops(setting, request.size)

        try:
            pictures, gflops = await self._in_thread(finish)
        except Exception as error:  # such as memory for the autoencoder
            self._fail(progress, error)
            return
        guidance = setting.guidance
        parts = zip(STAGES, pairwise([*times, time.time()]), strict=True)
        stages = {f"{name}_ms": 1e3 * (end - start) for name, (start, end) in parts}
        self.beside.append((stages["begin_ms"] + stages["pictures_ms"]) / len(runs))
        answer = {
            "images": pictures,
            "size": request.size or self.engine.size,
            "budget": branch_latents(setting)[0] or None,
            "steps": setting.steps,
            "guidance": {"scale": guidance.scale, "budget": guidance.budget} if guidance else None,
            "gflops": gflops,
            "queue_ms": stages["queue_ms"],
            "compute_ms": sum(stages.values()) - stages["queue_ms"],
            "stages": stages,
            "batch": sum(progress.batches) / len(progress.batches),
            "queue_length": len(self.policy.waiting),
            "replica": self.name,
        }
        self._answer(request, answer)

    def _answer(self, request: Request, answer: Json | Exception) -> None:
        if request.id in self.here:  # else the client has gone
            self.here[request.id].answers.put_nowait(answer)

    async def _in_thread(self, run: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, run, *arguments)


def encode(pixels: Tensor, kind: str) -> bytes:
    return encode_picture(sheet_frames(pixels, f".{kind}", scale=1), f".{kind}")


def load_replica(service: ServiceSettings, name: str = "0") -> Replica:
    """A replica of the service's model, with costs from a profile or measured now."""
    if service.threads:
        torch.set_num_threads(service.threads)
    device, folder = service.device or "cpu", model_folder(service.model)
    engine = load_engine(
        folder,
        device=device,
        dtype=service.dtype,
        compile=service.compile,
        exact=device == "cpu" if service.exact is None else service.exact,
        size=parse_size(service.size) if service.size else None,
    )
    profile = read_profile(service.profile) if service.profile else None
    if isinstance(engine, NetworkEngine):
        if len(engine.network.sample_size) != 2 or not engine.makes_pictures:
            raise ValueError(f"cannot serve {str(service.model)!r}: it makes no pictures")
        place = network_folder(folder)
        profile = profile or find_profile(engine.network, place and measurements_folder(place), compile=service.compile)
    costs = profile.costs() if profile is not None and profile.anatomy else measure_costs(engine)
    return Replica(engine, costs, service, name)
