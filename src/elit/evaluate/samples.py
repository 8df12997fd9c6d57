"""Sample sets of a network: each sample from its own seed, classes in turn, kept as they are made.

    OUT/sets/KEY/recipe.json    everything that decides the samples, but not how many
    OUT/sets/KEY/pictures/      FIRST-STOP.safetensors: pictures, their SHA-256s, milliseconds

More samples of the same recipe go on from those that are there.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from elit.budgets import Schedule, resolve_budget, schedule_budgets
from elit.costs.timing import timed
from elit.evaluate.chunks import Chunks, Progress, Share
from elit.evaluate.metrics import saturation
from elit.evaluate.recipe import (
    claim_folder,
    conditions_digest,
    describe_autoencoder,
    describe_network,
    device_name,
    recipe_digest,
    sample_digests,
    set_digest,
    versions,
)
from elit.flow.guidance import Guidance
from elit.flow.solver import time_grid
from elit.models.conditioning import Condition
from elit.models.transformer import Transformer
from elit.sampling.autoencoders import decode
from elit.sampling.evaluations import evaluated_steps, sampling_flops, sampling_plan
from elit.sampling.pictures import to_uint8
from elit.sampling.sample import sample
from elit.sampling.settings import Sampling

CHUNK = 32


def classes_of(conditions: Condition) -> Tensor:
    """(B,) the class that each sample is to show: its label, or a prompt's number, of prompts in the classes' order."""
    if isinstance(conditions, Tensor) and conditions.ndim == 1:
        return conditions.cpu()
    return torch.arange(len(conditions))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a network is sampled; arguments of `elit.sample`."""

    steps: int = 40
    budget: Schedule = None
    guidance: Guidance | None = None
    solver: str = "euler"
    shift: float = 1.0
    cache: float = 0.0
    seed: int = 0
    """Of sample 0; sample i has seed + i."""

    def arguments(self) -> dict[str, Any]:
        """Those that a sample's cost depends on."""
        return {name: value for name, value in vars(self).items() if name != "seed"}


class SampleSet:
    """The first `count` samples of a recipe, as `Pictures`; made by `Sampler.draw`."""

    def __init__(self, folder: Path, recipe: dict[str, Any], count: int, targets: Tensor, gflops: float):
        self.folder, self.recipe, self.count, self.targets = folder, recipe, count, targets
        self.gflops = gflops
        """Of a sample, all steps and guidance branches."""
        self.chunks = Chunks(folder / "pictures", recipe["chunk"])

    def __len__(self) -> int:
        return self.count

    def read(self, first: int, stop: int) -> Tensor:
        """(B, C, ...) uint8, the rows of one chunk or of several."""
        return self.chunks.read(first, stop, "pictures").movedim(-1, 1)

    def labels(self, first: int, stop: int) -> Tensor:
        return self.targets[torch.arange(first, stop) % len(self.targets)]

    def describe(self) -> dict[str, Any]:
        return self.recipe

    def stamp(self) -> str:
        return ""

    @property
    def ms(self) -> float:
        """Milliseconds of a sample in the fastest chunk, all steps, without the autoencoder."""
        return float(self.chunks.read(0, self.count, "ms").min())

    @property
    def saturation(self) -> float:
        """Mean over all pictures (paper Figure 15); see `metrics.saturation`."""
        total = sum(float(saturation(part.movedim(-1, 1)).sum()) for part in self.chunks.stream(self.count, "pictures"))
        return total / self.count

    @property
    def digest(self) -> str:
        """SHA-256 of all pictures in their order."""
        return set_digest(self.chunks.read(0, self.count, "sha256"))


class Sampler:
    """A network, ready to be sampled at many settings; hashes of its weights are made once.

    conditions: y of every class in turn, default all of the network's classes. vae: the autoencoder it was trained in.
    chunk: samples computed at once, always so many, since rounding depends on it. compile: torch.compile on the
    network, which rounds otherwise. Raises ValueError where the network's samples are no pictures.
    """

    def __init__(
        self,
        model: Transformer,
        out: Path,
        *,
        vae: ModelMixin | None = None,
        conditions: Condition | None = None,
        chunk: int = CHUNK,
        compile: bool = False,
    ):
        if vae is None and model.config.in_channels not in (1, 3):
            raise ValueError(
                f"vae: not given; samples of {model.config.in_channels} channels are no pictures without the "
                "autoencoder they were trained in"
            )
        if conditions is None:
            conditions = model.prepare_condition(range(model.config.num_classes))
        self.model, self.out, self.vae, self.conditions, self.chunk = model, out, vae, conditions, chunk
        self.compile = compile
        self.network = {
            "model": describe_network(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": device_name(model.device),
            "autoencoder": describe_autoencoder(vae),
            "conditions": conditions_digest(conditions),
            "versions": versions(),
        }

    def recipe(self, setting: Setting) -> dict[str, Any]:
        """Everything that decides a sample. Raises ValueError for a setting that does not fit the network."""
        times, budgets, guidance = time_grid(setting.steps, setting.shift), self.model.budgets, setting.guidance
        sampling_plan(self.model, Sampling(**vars(setting)))
        of_steps = schedule_budgets(setting.budget, times[:-1], budgets)
        second = None
        if guidance is not None and guidance.scale != 1:
            weak = None if guidance.kind == "cfg" else resolve_budget(guidance.budget, budgets)
            second = {
                "kind": guidance.kind,
                "scale": guidance.scale,
                "budget": weak,
                "interval": list(guidance.interval),
            }
        return {
            "kind": "samples",
            **self.network,
            "solver": setting.solver,
            "steps": setting.steps,
            "shift": setting.shift,
            "budget": of_steps[0] if len(set(of_steps)) == 1 else of_steps,  # the same however it was written
            "guidance": second,
            "cache": float(setting.cache),
            "seed": setting.seed,
            "chunk": self.chunk,
            **({"compile": True} if self.compile else {}),
        }

    def calls(self, setting: Setting) -> int:
        """Steps that ask the network."""
        return evaluated_steps(sampling_plan(self.model, Sampling(**vars(setting))))

    def planned(self, setting: Setting, count: int) -> SampleSet:
        """The set as `draw` gives it, whether or not it has been made. Raises ValueError for what does not fit."""
        if count < 2:
            raise ValueError(f"count={count}: give at least 2")
        recipe = self.recipe(setting)
        gflops = sampling_flops(self.model, **setting.arguments()) / 1e9
        folder = self.out / "sets" / recipe_digest(recipe)[:16]
        return SampleSet(folder, recipe, count, classes_of(self.conditions), gflops)

    def warm_up(self) -> None:
        """One step on a full chunk: the first call on a machine is slower, and would tell on its setting's time."""
        self._chunk(Setting(steps=1), 0)

    def draw(
        self,
        setting: Setting,
        count: int,
        *,
        batch_size: int = 256,
        share: Share = Share(),  # noqa: B008
        progress: Progress | None = None,
    ) -> SampleSet:
        """Makes what is missing of the first `count` samples, together with the other processes; never all in memory.

        batch_size: samples between two files, in whole chunks; changes none. progress: (samples done, samples of this
        process). Raises ValueError for what does not fit.
        """
        samples = self.planned(setting, count)
        if share.main:
            claim_folder(samples.folder, samples.recipe)
        share.wait()
        options: dict[str, Any] = {"batch_size": batch_size, "share": share, "progress": progress}
        samples.chunks.fill(count, lambda first: self._chunk(setting, first), **options)
        return samples

    def _chunk(self, setting: Setting, first: int) -> dict[str, Tensor]:
        """Samples first … first + chunk − 1, as a file has them: channels last."""
        numbers = torch.arange(first, first + self.chunk)
        y = self.conditions[numbers % len(self.conditions)]
        seeds = [setting.seed + i for i in numbers.tolist()]
        options: dict[str, Any] = {"seed": seeds, "compile": self.compile, **setting.arguments()}
        x, seconds = timed(lambda: sample(self.model, y, **options), self.model.device)
        ms = 1e3 * seconds / self.chunk
        with torch.no_grad():
            pictures = to_uint8(decode(self.vae, x))
        last = pictures.movedim(1, -1).contiguous()
        return {"pictures": last, "sha256": sample_digests(pictures), "ms": torch.full((self.chunk,), ms)}
