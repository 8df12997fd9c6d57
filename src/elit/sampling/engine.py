"""Engines make samples step by step: `elit.sample` loops over a run, a service interleaves runs, a page follows one."""

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from diffusers import ModelMixin
from torch import Tensor

from elit.budgets import budgets_of_samples, equal_parts
from elit.compat import copy_all
from elit.config import require
from elit.flow.guidance import CFG, Branch, guided_velocity
from elit.flow.solver import SOLVERS, time_grid
from elit.models.conditioning import Condition, Text, concatenate
from elit.models.text import encode_prompts
from elit.models.transformer import Transformer, joined
from elit.sampling.autoencoders import decode, downsampling
from elit.sampling.evaluations import sampling_flops, sampling_plan, shares_head
from elit.sampling.settings import Sampling

Conditions = Any  # the classes or prompts of samples as their engine takes them; opaque elsewhere
Seed = int | torch.Generator

# By network: how it was built when the copies or the twin were made, and the copies by dtype or the twin.
_copies: WeakKeyDictionary[Transformer, tuple[Any, dict[torch.dtype, Transformer]]] = WeakKeyDictionary()
_compiled: WeakKeyDictionary[Transformer, tuple[Any, Transformer]] = WeakKeyDictionary()


class Run(ABC):
    """`count` samples in progress, `steps_done` steps of `total`; `error` is one that ended this run alone."""

    engine: Any
    count: int
    steps_done: int = 0
    total: int
    error: Exception | None = None

    @property
    def done(self) -> bool:
        return self.steps_done >= self.total

    def step(self) -> None:
        """One step. Raises what ended the run."""
        self.engine.step([self])
        if self.error is not None:
            raise self.error

    @abstractmethod
    def pictures(self) -> Tensor:
        """The samples, once the run is done, as pixels (B, 1 or 3, ...) in [-1, 1] on the CPU, float32."""

    def preview(self) -> Tensor | None:
        """The pixels that the first sample would have if its velocity stayed as it is; None where none are known."""
        return None

    def close(self) -> None:
        """Ends the run before its last step."""
        self.total = self.steps_done


class Engine(Protocol):
    """A model, ready to make samples."""

    name: str  # its folder, or that of a model in the box
    network: Any  # the module whose weights make the samples
    exact: bool  # runs are stepped one by one, so that their bits do not depend on the other runs
    budgets: tuple[int, ...]
    takes_text: bool
    takes_negatives: bool  # there are negative prompts
    classes: tuple[str, ...]  # names or numbers; empty for a model that takes text
    makes_pictures: bool  # samples are pixels, or can be decoded to pixels
    clips: bool  # samples have frames
    multiple: int  # of width and height; 0 where there is one size
    guidance_kinds: tuple[str, ...]
    default_scale: float  # of guidance if none is given; 1 is off
    example: str  # a condition

    @property
    def size(self) -> tuple[int, int]: ...  # (width, height) in pixels where a run names none
    def conditions(self, names: Sequence[str]) -> Conditions: ...
    def begin(
        self,
        conditions: Conditions,
        seeds: Sequence[int],
        sampling: Sampling,
        *,
        size: tuple[int, int] | None = None,
        negatives: Sequence[str] = (),
    ) -> Run: ...
    def step(self, runs: Sequence[Any]) -> None: ...
    def gflops(self, sampling: Sampling, size: tuple[int, int] | None = None) -> float: ...


class NetworkRun(Run):
    """Samples of a network in progress."""

    def __init__(self, engine: "NetworkEngine", y: Condition, x: Tensor, sampling: Sampling, times: Sequence[float]):
        model = engine.network
        self.engine, self.count, self.total = engine, len(y), len(times) - 1
        self.sampling, self.times = sampling, times
        self.network = engine.network_in(sampling.dtype)
        self.dtype = self.network.dtype
        guidance = sampling.guidance or CFG(1.0)
        self.guide(guidance.scale)
        self.sample_budgets: list[list[int | None]] = []  # of every sample, by branch; empty where all are equal
        if sampling.sample_budgets:
            main = budgets_of_samples(sampling.sample_budgets, self.count, model.budgets, "sample_budgets")
            self.sample_budgets = [main, [guidance.weak_budget(each, model.budgets) for each in main]]
        self.y = y.to(model.device)
        self.null = model.conditioning.without(self.y)
        self.velocity: Tensor | None = None  # the velocity of the last evaluation
        self._solution = SOLVERS[sampling.solver](x.to(model.device, torch.float32), times)
        self.x, self.t, _ = next(self._solution)  # the state (B, C, ...), and its time

    def guide(self, scale: float) -> None:
        """Plans the evaluations for a scale of guidance, from here on. Raises ValueError as `sampling_plan`."""
        guidance = self.sampling.guidance if self.sampling.guidance or scale == 1 else CFG(1.0)
        guided = replace(self.sampling, guidance=guidance and replace(guidance, scale=scale))
        self.scale, self.evaluations = scale, sampling_plan(self.engine.network, guided, self.times)

    @property
    def branches(self) -> list[Branch]:
        """Evaluations of the network due at this state; none where the last velocity is used again."""
        return self.evaluations[self.steps_done][self.t]

    def budgets_of(self, branch: int) -> list[int | None]:
        """One budget a sample."""
        return self.sample_budgets[branch] if self.sample_budgets else [self.branches[branch].budget] * self.count

    def advance(self, velocity: Tensor) -> None:
        """Goes on to the next state that needs a velocity, or to the end."""
        self.velocity = velocity
        try:
            self.x, self.t, self.steps_done = self._solution.send(velocity)
        except StopIteration as end:
            self.x, self.t, self.steps_done = end.value, 1.0, self.total

    @torch.no_grad()
    def pictures(self) -> Tensor:
        parts = self.x.split(1) if self.engine.exact else [self.x]
        return torch.cat([decode(self.engine.vae, part).float().cpu() for part in parts])

    @torch.no_grad()
    def preview(self) -> Tensor:
        x = self.x[:1] if self.velocity is None else self.x[:1] + (1 - self.t) * self.velocity[:1]
        return decode(self.engine.vae, x).float().cpu()


class NetworkEngine:
    """A network of this library, with the autoencoder it was trained in; text_encoder: of prompts, default as saved."""

    takes_negatives, default_scale, multiple = False, 1.0, 0

    def __init__(
        self,
        model: Transformer,
        vae: ModelMixin | None = None,
        *,
        name: str = "",
        text_encoder: str | None = None,
        compile: bool = False,
        exact: bool = False,
    ):
        self.network, self.vae, self.name, self.exact = model, vae, name, exact
        self.text_encoder, self.compile = text_encoder, compile
        self.budgets, self.takes_text = model.budgets, model.takes_text
        self.classes: tuple[str, ...] = ()
        if not self.takes_text:
            self.classes = tuple(model.config.get("class_names") or map(str, range(model.config.num_classes)))
        self.guidance_kinds: tuple[str, ...] = ("none", "cfg", "ag", "ccfg") if self.budgets else ("none", "cfg")
        self.example = "a picture" if self.takes_text else "0"
        self.makes_pictures = vae is not None or model.config.in_channels in (1, 3)
        self.clips = len(model.sample_size) == 3
        self._networks = {model.dtype: model}

    @property
    def size(self) -> tuple[int, int]:
        height, width = (length * downsampling(self.vae) for length in self.network.sample_size[-2:])
        return width, height

    def network_in(self, dtype: torch.dtype | str | None) -> Transformer:
        """The network in another dtype, with the weights that it had in this engine's first run of that dtype."""
        wanted = as_dtype(dtype) or self.network.dtype
        if wanted not in self._networks:
            self._networks[wanted] = in_dtype(self.network, wanted)
        return self._networks[wanted]

    def conditions(self, names: Sequence[str]) -> Condition:
        model, config = self.network, self.network.config
        if not self.takes_text:
            return model.conditioning.prepare(list(names) or range(config.num_classes))
        require(bool(names), "prompts", "none", "at least one, such as --prompts 'a handwritten seven'")
        encoder = self.text_encoder or config.text_encoder
        return encode_prompts(list(names), encoder, length=config.text_length, device=str(model.device))

    def begin(
        self,
        conditions: Conditions,
        seeds: Sequence[Seed],
        sampling: Sampling,
        *,
        size: tuple[int, int] | None = None,
        negatives: Sequence[str] = (),
        noise: Tensor | None = None,
        times: Sequence[float] | None = None,
    ) -> NetworkRun:
        """A run; noise takes the place of seeds and size, times that of the sampling's own."""
        y = conditions if isinstance(conditions, Tensor | Text) else self.conditions(conditions)
        if noise is None:
            latents = self.network.sample_size if size is None else self.latent_size(size[1], size[0])
            noise = seeded_noise(seeds, (self.network.config.in_channels, *latents))
        return NetworkRun(self, y, noise, sampling, times or time_grid(sampling.steps, sampling.shift))

    @torch.no_grad()
    def step(self, runs: Sequence[NetworkRun]) -> None:
        ends = {run: run.steps_done + 1 for run in runs}
        for together in [[run] for run in runs] if self.exact else [runs]:
            while due := [run for run in together if run.steps_done < ends[run]]:  # some solvers evaluate a step twice
                for run, velocity in zip(due, self.velocities(due), strict=True):
                    run.advance(velocity)

    def velocities(self, runs: Sequence[NetworkRun]) -> list[Tensor]:
        """The guided velocity of every run at its state, float32: all branches in one forward, each at its budget."""
        found: dict[NetworkRun, Tensor] = {run: run.velocity for run in runs if run.velocity is not None}
        due = [run for run in runs if run.branches]
        for network in dict.fromkeys(run.network for run in due):
            together = [run for run in due if run.network is network]
            found.update(zip(together, self._evaluate(network, together), strict=True))
        return [found[run] for run in runs]

    def _evaluate(self, network: Transformer, runs: Sequence[NetworkRun]) -> list[Tensor]:
        """Main branches first, then the weak ones of guided runs; branches that share their head are one."""
        first = runs[0]
        shared = len(runs) == 1 and shares_head(first.branches) and not first.sample_budgets
        rows = [(run, branch) for branch in range(1 if shared else 2) for run in runs if branch < len(run.branches)]
        x = joined([run.x for run, _ in rows])
        # float32 times whatever the network's dtype: bfloat16 has 8 bits for them.
        t = joined([torch.full((run.count,), run.t, device=x.device, dtype=torch.float32) for run, _ in rows])
        y = concatenate([run.null if run.branches[branch].drop_class else run.y for run, branch in rows])
        if shared:
            budgets = [branch.budget for branch in first.branches]
        else:
            budgets = equal_parts([budget for run, branch in rows for budget in run.budgets_of(branch)])
        # torch 2.13's code asks for the one of two equal numbers that is gone
        if compiled := self.compile and len(set(budgets)) == len(budgets):
            torch.compiler.cudagraph_mark_step_begin()
        forward = as_compiled(network) if compiled else network
        v = forward(x.to(first.dtype), t, y, budgets, share_head=shared)
        v = v.to(x.dtype, copy=compiled)  # a CUDA graph writes its output again
        if shared:
            return [guided_velocity(v.chunk(2), first.scale)]
        parts = dict(zip(rows, v.split([run.count for run, _ in rows]), strict=True))
        return [guided_velocity([parts[run, i] for i in range(len(run.branches))], run.scale) for run in runs]

    def gflops(self, sampling: Sampling, size: tuple[int, int] | None = None) -> float:
        latents = None if size is None else self.latent_size(size[1], size[0])
        return sampling_flops(self.network, sampling, sample_size=latents) / 1e9

    def latent_size(self, height: int | None, width: int | None) -> tuple[int, ...]:
        """The network's own size of a picture of that many pixels. Raises ValueError, in pixels."""
        factor, size = downsampling(self.vae), list(self.network.sample_size)
        for axis, name, pixels in ((-2, "height", height), (-1, "width", width)):
            if pixels is not None:
                require(pixels > 0 and pixels % factor == 0, name, pixels, f"a multiple of {factor} pixels")
                size[axis] = pixels // factor
        try:
            self.network.token_grid(size)
        except ValueError as error:
            pixels = "×".join(str(length * factor) for length in size[-2:])
            raise ValueError(f"cannot make pictures of {pixels} pixels, {factor} a cell: {error}") from None
        return tuple(size)


def seeded_noise(seeds: Sequence[Seed], shape: Sequence[int]) -> Tensor:
    """(B, *shape) standard normal on the CPU, each sample from its own seed or generator, so equal on every device."""
    draws = []
    for seed in seeds:
        source = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        draws.append(torch.randn(*shape, generator=source, device=source.device).cpu())
    return torch.stack(draws)


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype from its name, such as "bfloat16"; others as they are."""
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def in_dtype(model: Transformer, dtype: torch.dtype) -> Transformer:
    """A copy in `dtype`, with the weights of now; kept as long as `model` lives and is built as it was."""
    built = model.device, _structure(model)
    if model not in _copies or _copies[model][0] != built:
        _copies[model] = built, {}
    copies = _copies[model][1]
    with torch.inference_mode(False), torch.no_grad():  # a copy made in inference mode could not be written to later
        if dtype not in copies:
            copies[dtype] = torch.nn.Module.to(copy.deepcopy(model), dtype).eval()  # without the advice of diffusers
        else:  # each time: a write through `.data`, as when peft merges an adapter, leaves no trace
            copy_all(_tensors(copies[dtype]), _tensors(model))
    return copies[dtype]


def _tensors(model: Transformer) -> list[Tensor]:
    return [value.detach() for value in (*model.parameters(), *model.buffers())]


def _structure(model: Transformer) -> str:
    """Class and settings of every module beside its weights, such as peft's adapters: active, merged or off."""
    others = ("_modules", "_parameters", "_buffers", "training")
    settings = [
        (type(module).__name__, {name: value for name, value in vars(module).items() if name not in others})
        for module in model.modules()
    ]
    return json.dumps(settings, skipkeys=True, default=lambda value: type(value).__name__)


def as_compiled(model: Transformer) -> Transformer:
    """A twin with the same weights and a compiled forward; sizes are dynamic, so all budgets but 1 share a graph."""
    built = type(model), *(item for item in vars(model).items() if item[0] != "training")
    if model not in _compiled or _compiled[model][0] != built:
        twin = copy.copy(model)  # the modules themselves, so that the network stays as it was
        twin.compile(dynamic=True, mode="reduce-overhead" if model.device.type == "cuda" else None)
        _compiled[model] = built, twin
    return _compiled[model][1]


def conditions_of(engine: Engine, labels: Sequence[str], prompts: Sequence[str]) -> Conditions:
    """The conditions of labels or prompts, as `begin` takes them. Raises ValueError for those of the other kind."""
    if engine.takes_text and labels:
        raise ValueError(f"labels are not supported for this model, which takes prompts, got {labels[0]!r}")
    if prompts and not engine.takes_text:
        raise ValueError(f"prompts are not supported for this model, which takes labels, got {prompts[0]!r}")
    return engine.conditions(prompts or labels)


def take(conditions: Conditions, rows: Sequence[int]) -> Conditions:
    """The conditions of samples by number, in turn."""
    if isinstance(conditions, list):
        return [conditions[row % len(conditions)] for row in rows]
    return conditions[torch.tensor(rows) % len(conditions)]
