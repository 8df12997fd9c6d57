"""Sample sets of a network: each sample from its own seed, classes in turn, kept in OUT/sets/KEY as they are made."""

from dataclasses import dataclass, replace

import torch
from diffusers import ModelMixin
from torch import Tensor

from elit.budgets import resolve_budget, schedule_budgets
from elit.costs.timing import timed
from elit.evaluate.chunks import Chunks, Progress, Work, conditions_digest, describe_run, keep_recipe, sample_digests
from elit.evaluate.metrics import saturation
from elit.evaluate.pictures import Pictures
from elit.files import Json
from elit.flow.solver import time_grid
from elit.models.conditioning import Condition, recognised
from elit.models.transformer import Transformer
from elit.sampling.autoencoders import decode
from elit.sampling.evaluations import sampling_flops, sampling_plan
from elit.sampling.pictures import to_uint8
from elit.sampling.sample import sample
from elit.sampling.settings import Sampling


@dataclass(frozen=True, kw_only=True)
class SampleSet(Pictures):
    """The first `count` samples of a recipe; made by `Sampler.make`."""

    chunks: Chunks
    gflops: float  # a sample's, all steps and guidance branches

    @property
    def ms(self) -> float:
        """Milliseconds of a sample in the fastest chunk, all steps, without the autoencoder."""
        return float(self.chunks.read("ms").min())

    @property
    def saturation(self) -> float:
        return sum(float(saturation(part.movedim(-1, 1)).sum()) for part in self.chunks.stream("pictures")) / self.count


class Sampler:
    """A network, ready to be sampled at many settings; its weights are hashed once."""

    def __init__(
        self,
        model: Transformer,
        work: Work,
        *,
        vae: ModelMixin | None = None,
        conditions: Condition | None = None,
        compile: bool = False,
    ):
        if vae is None and model.config.in_channels not in (1, 3):
            raise ValueError(f"cannot make pictures of samples of {model.config.in_channels} channels: give vae")
        if conditions is None:
            conditions = model.conditioning.prepare(range(model.config.num_classes))
        self.model, self.work, self.vae, self.conditions, self.compile = model, work, vae, conditions, compile
        self.network = describe_run(model, vae) | {"conditions": conditions_digest(conditions)}

    def recipe(self, sampling: Sampling) -> Json:
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
            "chunk": self.work.chunk,
            **({"compile": True} if self.compile else {}),
        }

    def calls(self, sampling: Sampling) -> int:
        """Steps that evaluate the network; the others are saved by a cache."""
        return sum(any(step.values()) for step in sampling_plan(self.model, sampling))

    def planned(self, sampling: Sampling, count: int) -> SampleSet:
        """The set as `make` gives it, made or not."""
        recipe = self.recipe(sampling)
        chunks = self.work.chunks("sets", recipe, count, "pictures")
        # The class that a sample is to show: its label, or a prompt's number, of prompts in the classes' order.
        given, classes = self.conditions, torch.arange(len(self.conditions))
        if isinstance(given, Tensor) and given.ndim == 1:
            numbers = recognised(getattr(self.model.conditioning, "class_names", ()))
            classes = torch.tensor([*numbers, *range(len(numbers), int(given.max()) + 1)])[given.cpu()]
        return SampleSet(
            count=count,
            read=lambda first, stop: chunks.read("pictures", first, stop).movedim(-1, 1),
            labels=classes[torch.arange(count) % len(classes)],
            recipe=recipe,
            chunks=chunks,
            gflops=sampling_flops(self.model, sampling) / 1e9,
        )

    def warm_up(self) -> None:
        """One step on a full chunk: the first call on a machine is slower, and would count in its setting's time."""
        self._chunk(Sampling(steps=1), 0)

    def make(self, sampling: Sampling, count: int, progress: Progress | None = None) -> SampleSet:
        """Makes the missing ones of the first `count` samples, together with the other processes."""
        samples = self.planned(sampling, count)
        keep_recipe(samples.chunks.folder.parent, samples.recipe, self.work)
        samples.chunks.fill(lambda first: self._chunk(sampling, first), self.work, progress)
        return samples

    def _chunk(self, sampling: Sampling, first: int) -> dict[str, Tensor]:
        size = self.work.chunk
        y = self.conditions[torch.arange(first, first + size) % len(self.conditions)]
        seeded = replace(sampling, seed=sampling.seed + first)
        x, seconds = timed(lambda: sample(self.model, y, seeded, compile=self.compile), self.model.device)
        with torch.no_grad():
            pictures = to_uint8(decode(self.vae, x))
        return {
            "pictures": pictures.movedim(1, -1).contiguous(),
            "sha256": sample_digests(pictures),
            "ms": torch.full((size,), 1e3 * seconds / size),
        }
