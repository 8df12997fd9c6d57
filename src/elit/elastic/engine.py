"""Samples of diffusers pipelines step by step, by the pipelines' own calls; and the engine of any model.

With `exact`, the default on a CPU, every run has a call of its own, and with it the pixels of the pipeline called
alone. Else runs share a call where they start at the same step and have the same size, steps, budgets and guidance;
the batch of a call is fixed when it starts, and budgets are not mixed in it.
"""

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from elit.budgets import resolve_budget, schedule_budgets
from elit.config import require
from elit.elastic.context import budget as budget_of
from elit.elastic.cost import count_block_flops
from elit.elastic.families import family_of
from elit.elastic.families.family import Grid, Pipeline
from elit.elastic.load import load_network, open_pipeline
from elit.elastic.pipelines import cell_of, default_size
from elit.elastic.recording import first_call
from elit.elastic.trees import Arguments, Tree
from elit.flow.solver import time_grid
from elit.models.conditioning import class_numbers
from elit.models.transformer import Transformer
from elit.sampling.engine import Engine, NetworkEngine, Run
from elit.sampling.pictures import from_pictures
from elit.sampling.settings import Sampling

DEFAULTS = Sampling()


class StepwiseCall:
    """`pipe(**arguments)` inside `context`, begun by the first `advance`; others may run between two of its steps.

    The call runs in a thread of its own, which goes on only while somebody waits in `advance`, so that never two run at
    a time. It stops behind each `scheduler.step`, which every pipeline calls once a timestep. What a call changes in
    its pipeline, scheduler and settings of the run, is its own; the networks are shared.
    """

    def __init__(self, pipe: Pipeline, arguments: Arguments, context: AbstractContextManager[None], *, users: int = 1):
        """users: how many may `leave` before the call is given up."""
        self.pipe, self.arguments, self.context, self.users = copy.copy(pipe), arguments, context, users
        self.pipe.scheduler = scheduler = copy.deepcopy(pipe.scheduler)
        scheduler.step = self._pausing(scheduler.step)
        self.steps = 0
        """Taken so far."""
        self.output: Tree = None
        """The result of the call, once it is over."""
        self._error: Exception | None = None
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._over = self._given_up = False
        self._thread: threading.Thread | None = None

    @property
    def total(self) -> int:
        """Steps in all, as the scheduler has them; 0 before the first one."""
        return len(self.pipe.scheduler.timesteps) if self.steps else 0

    def advance(self) -> bool:
        """Runs to behind the next step, or to the end; returns whether it goes on. Raises what the call does."""
        if self._over or self._given_up:
            return False
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="pipeline", daemon=True)
            self._thread.start()
        self._go.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error
        return not self._over

    def finish(self) -> Tree:
        """Runs to the end; what the call returned."""
        while self.advance():
            pass
        return self.output

    def leave(self) -> None:
        """One user fewer; with the last one the call ends behind the step that it is in."""
        self.users -= 1
        if self.users <= 0:
            self._given_up = True
            self._go.release()

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._given_up:
                with self.context:
                    self.output = self.pipe(**self.arguments)
        except _GivenUp:
            pass
        except Exception as error:  # raised by `advance`, for whoever waits there
            self._error = error
        finally:
            self._over = True
            self._paused.release()

    def _pausing(self, step: Callable[..., Tree]) -> Callable[..., Tree]:
        @functools.wraps(step)  # pipelines look at its arguments
        def paused(*args: Tree, **kwargs: Tree) -> Tree:
            result = step(*args, **kwargs)
            self.steps += 1
            self._paused.release()
            self._go.acquire()
            if self._given_up:
                raise _GivenUp
            return result

        return paused


class _GivenUp(Exception):
    """Nobody waits for the call any more."""


class PipelineRun(Run):
    """Samples of a pipeline in progress; the call begins with the first step."""

    def __init__(
        self,
        engine: "PipelineEngine",
        conditions: Sequence[str],
        seeds: Sequence[int],
        sampling: Sampling,
        size: tuple[int, int],
        negatives: Sequence[str],
    ):
        self.engine, self.conditions, self.seeds, self.sampling = engine, conditions, seeds, sampling
        self.size, self.negatives = size, list(negatives) or [""] * len(conditions)
        self.count, self.total = len(conditions), sampling.steps
        budget, guidance = sampling.budget, sampling.guidance
        weak: Arguments = {"guidance": guidance.budget} if guidance and guidance.kind == "ccfg" else {}
        self.context = budget_of(list(budget) if isinstance(budget, tuple) else budget, **weak)
        self.call: StepwiseCall | None = None
        self.first = 0
        """Place of its samples in a shared call."""

    def alike(self) -> str:
        """A text that is the same for runs that may share a call."""
        return repr((self.size, self.sampling.steps, self.sampling.budget, self.sampling.guidance))

    def advance(self) -> None:
        """One step of the call; a second-order scheduler has more than one for each step of the run."""
        call = self.call
        assert call is not None
        call.advance()
        while call.total and call.steps * self.total < (self.steps_done + 1) * call.total and call.advance():
            pass

    def pictures(self) -> Tensor:
        assert self.call is not None
        return from_pictures(self.call.finish().images[self.first : self.first + self.count])

    def close(self) -> None:
        if self.call is not None:
            self.call.leave()


class PipelineEngine:
    """A diffusers pipeline with an elastified transformer, which makes pictures from texts or classes.

    name: as pictures record it. exact: None = on a CPU. size: (width, height) where a run names none; None = the
    pipeline's own. Raises ValueError for a pipeline that makes no pictures, or not from a text or a class alone.
    """

    def __init__(
        self, pipe: Pipeline, name: str = "", *, exact: bool | None = None, size: tuple[int, int] | None = None
    ):
        self.pipe, self.name, self.network = pipe, name, pipe.transformer
        self.known = inspect.signature(type(pipe).__call__).parameters
        self.kind = type(pipe).__name__
        if not hasattr(self.network, "elastic"):
            raise ValueError(f"cannot set budgets of {name!r}: its transformer is not elastified; elit distill does it")
        if "num_frames" in self.known or not {"prompt", "class_labels"} & set(self.known):
            raise ValueError(f"cannot make pictures with {name!r}: a {self.kind} needs more than a text or a class")
        pipe.set_progress_bar_config(disable=True)
        self.exact = self.network.device.type == "cpu" if exact is None else exact
        self.budgets = tuple(self.network.budgets)
        self.takes_text, self.takes_negatives = "class_labels" not in self.known, "negative_prompt" in self.known
        self.labels: dict[str, int] = getattr(pipe, "labels", None) or {}
        self.classes: tuple[str, ...] = ()
        if not self.takes_text:
            names = {number: name for name, number in reversed(list(self.labels.items()))}
            self.classes = tuple(names.get(i, str(i)) for i in range(self.network.config.num_embeds_ada_norm))
        self.makes_pictures, self.clips = True, False
        self.example = "a red boat" if self.takes_text else "0"
        names = ["true_cfg_scale"] + ["guidance_scale"] * (not self.network.config.get("guidance_embeds"))
        self.guidance_argument = next((name for name in names if name in self.known), None)
        self.guidance_kinds: tuple[str, ...] = ("none", "cfg", "ccfg") if self.guidance_argument else ("none",)
        # A true_cfg_scale is off without a negative prompt.
        own = self.known["guidance_scale"].default if self.guidance_argument == "guidance_scale" else None
        self.default_scale = float(own or 1.0)
        self.multiple = 2 * cell_of(pipe) if "height" in self.known else 0  # two cells of the autoencoder
        self.size = default_size(pipe) if size is None else self.check_size(size)
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
        labels, count = self.labels, len(self.classes)
        numbers = [labels[name] if name in labels else class_numbers([name], self.classes, count)[0] for name in names]
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
        return PipelineRun(self, self.conditions(conditions), seeds, sampling, size, negatives)

    def check(self, sampling: Sampling) -> None:
        """Raises ValueError for settings that a pipeline's call does not have."""
        for name in ("solver", "shift", "cache", "sample_budgets"):
            if (value := getattr(sampling, name)) != getattr(DEFAULTS, name):
                raise ValueError(f"{name}={value} is not supported for pipelines of diffusers")
        if (guidance := sampling.guidance) is not None:
            require(guidance.kind in self.guidance_kinds, "guidance", guidance.kind, f"one of {self.guidance_kinds}")
            require(guidance.interval == (0, 1), "guidance_interval", guidance.interval, "0 to 1 for pipelines")
        count = len(sampling.budget) if isinstance(sampling.budget, tuple) else sampling.steps
        require(count == sampling.steps, "step_budgets", count, f"{sampling.steps}, one a step")

    def step(self, runs: Sequence[PipelineRun]) -> None:
        new = sorted((run for run in runs if run.call is None), key=PipelineRun.alike)
        for _, together in groupby(new, key=id if self.exact else PipelineRun.alike):
            self._start(list(together))
        errors: dict[StepwiseCall | None, Exception] = {}
        for call, run in {run.call: run for run in runs if run.call is not None}.items():
            try:
                run.advance()
            except Exception as error:  # one run's text or size is no reason to fail the others
                errors[call] = error
        for run in runs:
            run.steps_done += 1
            run.error = run.error or errors.get(run.call)

    def _start(self, runs: Sequence[PipelineRun]) -> None:
        """One call for the samples of all runs."""
        conditions = [condition for run in runs for condition in run.conditions]
        negatives = [text for run in runs for text in run.negatives]
        arguments = self.arguments(conditions, runs[0].sampling, runs[0].size, negatives)
        generators = [torch.Generator().manual_seed(seed) for run in runs for seed in run.seeds]
        arguments["generator"] = generators if len(generators) > 1 else generators[0]
        call, first = StepwiseCall(self.pipe, arguments, runs[0].context, users=len(runs)), 0
        for run in runs:
            run.call, run.first, first = call, first, first + run.count

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
        size, budgets, guidance = size or self.size, self.budgets, sampling.guidance
        counts = schedule_budgets(sampling.budget, time_grid(sampling.steps)[:-1], budgets)
        main = [self._flops(count, size) for count in counts]
        if guidance is None or guidance.scale <= 1:
            return sum(main) / 1e9
        if guidance.kind == "cfg" or guidance.budget is None:
            return 2 * sum(main) / 1e9
        return (sum(main) + len(main) * self._flops(resolve_budget(guidance.budget, budgets), size)) / 1e9

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
    exact: bool | None = None,
    size: tuple[int, int] | None = None,
) -> Engine:
    """The engine of a saved network, a saved pipeline, or an add-on, ready to make samples.

    vae: folder of a network's autoencoder, default the one beside it. exact: see `Engine`; None = for pipelines on a
    CPU. Raises ValueError for a model that cannot be loaded.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    name = str(model) if name is None else name
    if (pipeline := open_pipeline(model)) is not None:
        if vae is not None or text_encoder is not None:
            raise ValueError("cannot use another vae or text_encoder: a pipeline of diffusers has its own")
        pipe = pipeline.load(device=device, dtype=dtype)
        if compile:
            pipe.transformer.compile()
        return PipelineEngine(pipe, name, exact=exact, size=size)
    network, autoencoder = load_network(model, vae=vae, device=device, dtype=dtype)
    if not isinstance(network, Transformer):
        raise ValueError(f"cannot make samples with {name!r}: a transformer alone; give the folder of its pipeline")
    options: Arguments = {"text_encoder": text_encoder, "compile": compile, "exact": bool(exact)}
    engine = NetworkEngine(network, autoencoder, name=name, **options)
    require(size in (None, engine.size), "size", size, f"{engine.size} for this model")
    return engine
