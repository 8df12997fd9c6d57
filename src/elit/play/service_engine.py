"""A running service as an engine: each run is one request, served at exactly its settings or refused."""

import asyncio
import base64
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from elit.budgets import schedule_budgets
from elit.files import Json
from elit.models.labels import class_numbers
from elit.play.service import ServiceClient
from elit.sampling.engine import Run
from elit.sampling.pictures import from_pictures
from elit.sampling.settings import Sampling

DEADLINE_MS = 60_000.0
POLL_SECONDS = 0.1


class ServiceEngine:
    """A service of `elit serve`."""

    network: Any = None
    exact, takes_negatives, makes_pictures, clips, size, multiple = True, False, True, False, (0, 0), 0

    def __init__(self, client: ServiceClient):
        served = client.describe()
        self.client, self.name, self.info = client, f"{served['id']} at {client.url}", served["elit"]
        self.budgets: tuple[int, ...] = tuple(self.info["budgets"])
        self.takes_text = bool(self.info["text"])
        self.classes: tuple[str, ...] = tuple(self.info["class_names"]) or tuple(map(str, range(self.info["classes"])))
        self.example = "a picture" if self.takes_text else self.classes[0]
        self.default_scale = float(self.info["guidance_scale"])
        kinds = ("none", "cfg", "ccfg") if self.budgets else ("none", "cfg")
        self.guidance_kinds: tuple[str, ...] = kinds if self.info["guides"] else ("none",)

    def conditions(self, names: Sequence[str]) -> Sequence[str]:
        """The names themselves. Raises ValueError for a class that does not exist."""
        if not self.takes_text:
            class_numbers(names, self.info["class_names"], self.info["classes"])
        return names

    def gflops(self, sampling: Sampling, size: tuple[int, int] | None = None) -> float:
        """GFLOPs of a picture, by the service's costs of a step. Raises ValueError for settings it does not take."""
        guidance = sampling.guidance
        if isinstance(sampling.budget, str):
            raise ValueError(f"budget must be the same for all steps of a service, got {sampling.budget}")
        if guidance is not None and guidance.kind not in self.guidance_kinds:
            raise ValueError(f"guidance must be one of {', '.join(self.guidance_kinds)}, got {guidance.kind}")
        branches = schedule_budgets(sampling.budget, [0.0], self.budgets)
        if guidance is not None and guidance.scale != 1:
            branches.append(guidance.weak_budget(branches[0], self.budgets))
        budgets, costs = zip(*self.info["step_gflops"], strict=True)
        return sampling.steps * float(np.interp([budget or 0 for budget in branches], budgets, costs).sum())

    def begin(
        self, conditions: Sequence[str], seeds: Sequence[int], sampling: Sampling, **other: object
    ) -> "ServiceRun":
        """A run of one picture. Raises ValueError for what the service does not take."""
        self.gflops(sampling)
        guidance = sampling.guidance
        body: Json = {"prompt": conditions[0], "seed": seeds[0], "num_inference_steps": sampling.steps}
        body |= {"deadline_ms": DEADLINE_MS, "guidance_scale": guidance.scale if guidance else 1.0}
        body |= {"budget": sampling.budget} if self.budgets else {"quality": "high"}
        if guidance is not None and guidance.kind == "ccfg" and guidance.scale != 1:
            body["guidance_budget"] = guidance.budget
        return ServiceRun(self, body)

    def step(self, runs: Sequence["ServiceRun"]) -> None:
        """Waits a moment for each answer. Raises ValueError for a refusal."""
        for run in runs:
            run.loop.run_until_complete(asyncio.wait({run.answer}, timeout=POLL_SECONDS))
            if run.answer.done():
                run.answer.result()
                run.steps_done = 1


class ServiceRun(Run):
    """A request on its way; closing it frees its place in the service."""

    count = total = 1

    def __init__(self, engine: ServiceEngine, body: Json):
        self.engine, self.loop = engine, asyncio.new_event_loop()
        self.answer = self.loop.create_task(engine.client.ask("/v1/images/generations", body))

    def pictures(self) -> Tensor:
        content = base64.b64decode(json.loads(self.answer.result())["data"][0]["b64_json"])
        return from_pictures([Image.open(io.BytesIO(content))])

    def close(self) -> None:
        self.answer.cancel()
        self.loop.run_until_complete(asyncio.gather(self.answer, return_exceptions=True))
        self.loop.close()
