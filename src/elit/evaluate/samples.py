"""Sample sets of a network: each sample from its own seed, classes in turn, kept as they are made.

    OUT/sets/KEY/recipe.json    everything that decides the samples, but not how many
    OUT/sets/KEY/pictures/      FIRST-STOP.safetensors: pictures, their SHA-256s, milliseconds

More samples of the same recipe go on from those that are there.
"""

from dataclasses import replace
from pathlib import Path
from typing import Unpack

import torch
from diffusers import ModelMixin
from torch import Tensor

from elit.budgets import resolve_budget, schedule_budgets
from elit.costs.timing import timed
from elit.evaluate.chunks import CHUNK, Chunks, Share, Work
from elit.evaluate.metrics import saturation
from elit.evaluate.pictures import Pictures
from elit.evaluate.recipe import (
    Recipe,
    claim_folder,
    conditions_digest,
    describe_autoencoder,
    describe_network,
    device_name,
    recipe_digest,
    sample_digests,
    versions,
)
from elit.flow.solver import time_grid
from elit.models.conditioning import Condition
from elit.models.transformer import Transformer
from elit.sampling.autoencoders import decode
from elit.sampling.evaluations import sampling_flops, sampling_plan
from elit.sampling.pictures import to_uint8
from elit.sampling.sample import sample
from elit.sampling.settings import Sampling


def classes_of(conditions: Condition) -> Tensor:
    """(B,) the class that each sample is to show: its label, or a prompt's number, of prompts in the classes' order."""
    if isinstance(conditions, Tensor) and conditions.ndim == 1:
        return conditions.cpu()
    return torch.arange(len(conditions))


class SampleSet(Pictures):
    """The first `count` samples of a recipe; made by `Sampler.make`."""

    def __init__(self, folder: Path, recipe: Recipe, count: int, classes: Tensor, gflops: float):
        self.folder, self.recipe, self.count, self.classes = folder, recipe, count, classes
        self.gflops = gflops
        """A sample's, all steps and guidance branches."""
        self.chunks = Chunks(folder / "pictures", recipe["chunk"])

    def read(self, first: int, stop: int) -> Tensor:
        return self.chunks.read(first, stop, "pictures").movedim(-1, 1)

    def labels(self, first: int, stop: int) -> Tensor:
        return self.classes[torch.arange(first, stop) % len(self.classes)]

    def describe(self) -> Recipe:
        return self.recipe

    @property
    def ms(self) -> float:
        """Milliseconds of a sample in the fastest chunk, all steps, without the autoencoder."""
        return float(self.chunks.read(0, self.count, "ms").min())

    @property
    def saturation(self) -> float:
        """Mean over all pictures (paper Figure 15); see `metrics.saturation`."""
        total = sum(float(saturation(part.movedim(-1, 1)).sum()) for part in self.chunks.stream(self.count, "pictures"))
        return total / self.count


class Sampler:
    """A network, ready to be sampled at many settings; its weights are hashed once.

    conditions: y of every class in turn, default all of the network's classes. vae: the autoencoder it was trained in.
    chunk: samples computed at once, always the same number, since rounding depends on it. compile: torch.compile on the
    network, which rounds differently. Raises ValueError where the network's samples are not pictures.
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
                f"cannot make pictures of samples of {model.config.in_channels} channels: give vae, the autoencoder "
                "the model was trained in"
            )
        if conditions is None:
            conditions = model.prepare_condition(range(model.config.num_classes))
        self.model, self.out, self.vae, self.conditions, self.chunk = model, out, vae, conditions, chunk
        self.compile = compile
        self.network: Recipe = {
            "model": describe_network(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": device_name(model.device),
            "autoencoder": describe_autoencoder(vae),
            "conditions": conditions_digest(conditions),
            "versions": versions(),
        }

    def recipe(self, sampling: Sampling) -> Recipe:
        """Everything that decides a sample. Raises ValueError for settings that do not fit the network."""
        times, budgets, guidance = time_grid(sampling.steps, sampling.shift), self.model.budgets, sampling.guidance
        self.calls(sampling)
        of_steps = schedule_budgets(sampling.budget, times[:-1], budgets)
        second = None
        if guidance is not None and guidance.scale != 1:
            second = {
                "kind": guidance.kind,
                "scale": guidance.scale,
                "budget": None if guidance.kind == "cfg" else resolve_budget(guidance.budget, budgets),
                "interval": list(guidance.interval),
            }
        return {
            "kind": "samples",
            **self.network,
            "solver": sampling.solver,
            "steps": sampling.steps,
            "shift": sampling.shift,
            "budget": of_steps[0] if len(set(of_steps)) == 1 else of_steps,  # the same however it was written
            "guidance": second,
            "cache": float(sampling.cache),
            "seed": sampling.seed,
            "chunk": self.chunk,
            **({"compile": True} if self.compile else {}),
        }

    def calls(self, sampling: Sampling) -> int:
        """Steps that evaluate the network; the others are saved by a cache."""
        return sum(any(step.values()) for step in sampling_plan(self.model, sampling))

    def planned(self, sampling: Sampling, count: int) -> SampleSet:
        """The set as `make` gives it, made or not. Raises ValueError for settings that do not fit the network."""
        recipe = self.recipe(sampling)
        gflops = sampling_flops(self.model, sampling) / 1e9
        folder = self.out / "sets" / recipe_digest(recipe)[:16]
        return SampleSet(folder, recipe, count, classes_of(self.conditions), gflops)

    def warm_up(self) -> None:
        """One step on a full chunk: the first call on a machine is slower, and would count in its setting's time."""
        self._chunk(Sampling(steps=1), 0)

    def make(self, sampling: Sampling, count: int, **work: Unpack[Work]) -> SampleSet:
        """Makes the missing ones of the first `count` samples, together with the other processes; never all in memory.

        Raises ValueError for settings that do not fit the network.
        """
        samples = self.planned(sampling, count)
        claim_folder(samples.folder, samples.recipe, work.get("share", Share()))
        samples.chunks.fill(count, lambda first: self._chunk(sampling, first), **work)
        return samples

    def _chunk(self, sampling: Sampling, first: int) -> dict[str, Tensor]:
        """Samples first … first + chunk − 1, as a file has them: channels last."""
        numbers = torch.arange(first, first + self.chunk)
        y = self.conditions[numbers % len(self.conditions)]
        seeded = replace(sampling, seed=sampling.seed + first)
        x, seconds = timed(lambda: sample(self.model, y, seeded, compile=self.compile), self.model.device)
        with torch.no_grad():
            pictures = to_uint8(decode(self.vae, x))
        return {
            "pictures": pictures.movedim(1, -1).contiguous(),
            "sha256": sample_digests(pictures),
            "ms": torch.full((self.chunk,), 1e3 * seconds / self.chunk),
        }
