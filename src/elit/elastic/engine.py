"""Samples of diffusers pipelines step by step, by the pipelines' own calls; and the engine of any model."""

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from elit.budgets import resolve_budget, schedule_budgets
from elit.config import require
from elit.elastic.context import budget as budget_of
from elit.elastic.cost import count_block_flops
from elit.elastic.families import family_of
from elit.elastic.families.family import Arguments, Grid, Pipeline, Tree
from elit.elastic.load import load_network, open_pipeline
from elit.elastic.pipelines import Stopped, cell_of, default_size, first_call
from elit.flow.solver import time_grid
from elit.models.conditioning import class_numbers
from elit.models.transformer import Transformer
from elit.sampling.engine import Engine, NetworkEngine, Run
from elit.sampling.pictures import from_pictures
from elit.sampling.settings import Sampling


class PipelineRun(Run):
    """Samples of a pipeline in progress: `pipe(**arguments)`, begun by the first step; others may run between steps."""

    def __init__(self, engine: "PipelineEngine", arguments: Arguments, seeds: Sequence[int], sampling: Sampling):
        self.engine, self.count, self.total = engine, len(seeds), sampling.steps
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.arguments = arguments | {"generator": generators if len(generators) > 1 else generators[0]}
        budget, guidance = sampling.budget, sampling.guidance
        weak: Arguments = {"guidance": guidance.budget} if guidance and guidance.kind == "ccfg" else {}
        self.context = budget_of(list(budget) if isinstance(budget, tuple) else budget, **weak)
        self.pipe = copy.copy(engine.pipe)
        self.pipe.scheduler = self.scheduler = copy.deepcopy(engine.pipe.scheduler)
        self.scheduler.step = self._pausing(self.scheduler.step)
        self.output: Tree = None
        self.thread: threading.Thread | None = None
        self._timesteps, self._over, self._given_up = 0, False, False
        self._failure: Exception | None = None
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)

    def advance(self) -> None:
        """One step of the run; a second-order scheduler has more than one for it. Raises what the call does."""
        self._go_on()
        while self._timesteps * self.total < (self.steps_done + 1) * len(self.scheduler.timesteps) and self._go_on():
            pass

    def _go_on(self) -> bool:
        """Lets the call run to behind its next step, or to the end; returns whether it goes on."""
        if self._over or self._given_up:
            return False
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, name="pipeline", daemon=True)
            self.thread.start()
        else:
            self._go.release()
        self._paused.acquire()
        if self._failure is not None:
            raise self._failure
        return not self._over

    def pictures(self) -> Tensor:
        while self._go_on():
            pass
        return from_pictures(self.output.images)

    def close(self) -> None:
        self._given_up = True
        self._go.release()

    def _run(self) -> None:
        try:
            with self.context, suppress(Stopped):
                self.output = self.pipe(**self.arguments)
        except Exception as error:  # raised for whoever waits
            self._failure = error
        finally:
            self._over = True
            self._paused.release()

    def _pausing(self, step: Callable[..., Tree]) -> Callable[..., Tree]:
        @functools.wraps(step)  # pipelines look at its arguments
        def paused(*args: Tree, **kwargs: Tree) -> Tree:
            result = step(*args, **kwargs)
            self._timesteps += 1
            self._paused.release()
            self._go.acquire()
            if self._given_up:
                raise Stopped
            return result

        return paused


class PipelineEngine:
    """A diffusers pipeline with an elastified transformer, which makes pictures from texts or classes."""

    exact, makes_pictures, clips = True, True, False

    def __init__(self, pipe: Pipeline, name: str = "", *, size: tuple[int, int] | None = None):
        self.pipe, self.name, self.network, self.kind = pipe, name, pipe.transformer, type(pipe).__name__
        known = inspect.signature(type(pipe).__call__).parameters
        if not hasattr(self.network, "elastic"):
            raise ValueError(f"cannot set budgets of {name!r}: its transformer is not elastified; elit distill does it")
        if "num_frames" in known or not {"prompt", "class_labels"} & set(known):
            raise ValueError(f"cannot make pictures with {name!r}: a {self.kind} needs more than a text or a class")
        pipe.set_progress_bar_config(disable=True)
        self.budgets = tuple(self.network.budgets)
        self.takes_text, self.takes_negatives = "class_labels" not in known, "negative_prompt" in known
        self.example = "a red boat" if self.takes_text else "0"
        self.labels: dict[str, int] = getattr(pipe, "labels", None) or {}
        self.classes: tuple[str, ...] = ()
        if not self.takes_text:
            names = {number: name for name, number in reversed(list(self.labels.items()))}
            self.classes = tuple(names.get(i, str(i)) for i in range(self.network.config.num_embeds_ada_norm))
        scales = ["true_cfg_scale"] + ["guidance_scale"] * (not self.network.config.get("guidance_embeds"))
        self.guidance_argument = next((name for name in scales if name in known), None)
        self.guidance_kinds: tuple[str, ...] = ("none", "cfg", "ccfg") if self.guidance_argument else ("none",)
        # A true_cfg_scale is off without a negative prompt.
        own = known["guidance_scale"].default if self.guidance_argument == "guidance_scale" else None
        self.default_scale = float(own or 1.0)
        self.multiple = 2 * cell_of(pipe) if "height" in known else 0  # two cells of the autoencoder
        trained = self.network.elastic_record.size if self.multiple else None
        self.size = self.check_size(size or (trained[::-1] if trained else default_size(pipe)))
        self._layouts: dict[tuple[int, int], tuple[tuple[Grid, ...], int]] = {}

    def check_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """`size`. Raises ValueError for one that the pipeline does not have."""
        own, multiple = default_size(self.pipe), self.multiple
        if size != own:
            require(bool(multiple), "size", f"{size[0]}x{size[1]}", f"{own[0]}x{own[1]} for a {self.kind}")
            for name, pixels in zip(("width", "height"), size, strict=True):
                require(pixels > 0 and pixels % multiple == 0, name, pixels, f"a multiple of {multiple}")
        return size

    def conditions(self, names: Sequence[str]) -> list[str]:
        require(bool(names), "prompts" if self.takes_text else "labels", "none", "at least one")
        if not self.takes_text:
            self.class_numbers(names)
        return list(names)

    def class_numbers(self, names: Sequence[str]) -> list[int]:
        """Numbers of classes by name or number. Raises ValueError for a class that there is not."""
        count = len(self.classes)
        numbers = class_numbers([self.labels.get(name, name) for name in names], self.classes, count)
        for number in numbers:
            require(0 <= number < count, "labels", number, f"0 to {count - 1}")
        return numbers

    def begin(
        self,
        conditions: Sequence[str],
        seeds: Sequence[int],
        sampling: Sampling,
        *,
        size: tuple[int, int] | None = None,
        negatives: Sequence[str] = (),
    ) -> PipelineRun:
        self.check(sampling)
        size = self.size if size is None else self.check_size(size)
        arguments = self.arguments(self.conditions(conditions), sampling, size, negatives or [""] * len(conditions))
        return PipelineRun(self, arguments, seeds, sampling)

    def check(self, sampling: Sampling) -> None:
        """Raises ValueError for settings that a pipeline's call does not have."""
        for name in ("solver", "shift", "cache", "sample_budgets"):
            if (value := getattr(sampling, name)) != getattr(Sampling(), name):
                raise ValueError(f"{name}={value} is not supported for pipelines of diffusers")
        if (guidance := sampling.guidance) is not None:
            require(guidance.kind in self.guidance_kinds, "guidance", guidance.kind, f"one of {self.guidance_kinds}")
            require(guidance.interval == (0, 1), "guidance_interval", guidance.interval, "0 to 1 for pipelines")
        count = len(sampling.budget) if isinstance(sampling.budget, tuple) else sampling.steps
        require(count == sampling.steps, "step_budgets", count, f"{sampling.steps}, one a step")

    def step(self, runs: Sequence[PipelineRun]) -> None:
        for run in runs:
            try:
                run.advance()
            except Exception as error:  # one run's text or size is no reason to fail the others
                run.error = error
            run.steps_done += 1

    def arguments(
        self, conditions: Sequence[str], sampling: Sampling, size: tuple[int, int], negatives: Sequence[str]
    ) -> Arguments:
        """Arguments of the pipeline's call, without seeds."""
        arguments: Arguments = {"num_inference_steps": sampling.steps, "output_type": "pil"}
        if self.takes_text:
            arguments["prompt"] = list(conditions)
        else:
            arguments["class_labels"] = self.class_numbers(conditions)
        scale = sampling.guidance.scale if sampling.guidance else 1.0
        if self.guidance_argument is not None:
            arguments[self.guidance_argument] = scale
        if scale > 1 and self.takes_negatives:
            # If the scale is called true_cfg_scale, a call without a negative prompt leaves guidance out.
            arguments["negative_prompt"] = [text or " " for text in negatives]
        if self.multiple:
            arguments["width"], arguments["height"] = size
        return arguments

    def gflops(self, sampling: Sampling, size: tuple[int, int] | None = None) -> float:
        """GFLOPs of one sample: the transformer's blocks, Read and Write; a schedule as with even steps."""
        self.check(sampling)
        size, guidance = size or self.size, sampling.guidance
        counts = schedule_budgets(sampling.budget, time_grid(sampling.steps)[:-1], self.budgets)
        if guidance is not None and guidance.scale > 1:
            own = guidance.kind == "ccfg" and guidance.budget is not None
            counts += [resolve_budget(guidance.budget, self.budgets)] * len(counts) if own else counts
        return sum(self._flops(count, size) for count in counts) / 1e9

    def _flops(self, budget: int | None, size: tuple[int, int]) -> int:
        """One branch of one step, with a text as long as an example's."""
        if size not in self._layouts:
            request = self.arguments([self.example], Sampling(steps=1), size, [""])
            call = first_call(self.pipe, request | {"generator": torch.Generator().manual_seed(0)})
            family = family_of(self.network)
            self._layouts[size] = family.grids(self.network, call), family.text(self.network, call)
        grids, length = self._layouts[size]
        return count_block_flops(self.network, tokens=grids, text_tokens=length, budget=budget)


def load_engine(
    model: str | Path,
    *,
    name: str | None = None,
    vae: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = torch.float32,
    text_encoder: str | None = None,
    compile: bool = False,
    exact: bool = False,
    size: tuple[int, int] | None = None,
) -> Engine:
    """The engine of a saved network, a saved pipeline, or an add-on, ready to make samples."""
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    name = str(model) if name is None else name
    if (pipeline := open_pipeline(model)) is not None:
        if vae is not None or text_encoder is not None:
            raise ValueError("cannot use another vae or text_encoder: a pipeline of diffusers has its own")
        pipe = pipeline.load(device=device, dtype=dtype)
        if compile:
            pipe.transformer.compile()
        return PipelineEngine(pipe, name, size=size)
    network, autoencoder = load_network(model, vae=vae, device=device, dtype=dtype)
    if not isinstance(network, Transformer):
        raise ValueError(f"cannot make samples with {name!r}: a transformer alone; give the folder of its pipeline")
    engine = NetworkEngine(network, autoencoder, name=name, text_encoder=text_encoder, compile=compile, exact=exact)
    require(size in (None, engine.size), "size", size, f"{engine.size} for this model")
    return engine
