"""The task that all distillations share, and that of this library's own DiT, on the data it was trained on."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from elit.budgets import training_budgets
from elit.config import DistillConfig, TrainConfig, require
from elit.data.images import LatentSet
from elit.data.loader import StepSampler
from elit.elastic.context import original
from elit.elastic.cost import count_block_flops
from elit.elastic.families import all_blocks, family_of
from elit.elastic.families.family import Model
from elit.elastic.interface import add_low_rank
from elit.elastic.load import put_add_on
from elit.elastic.surgery import elastify
from elit.flow.path import flow_matching_loss, interpolate
from elit.models.saved import load_own, save_model
from elit.training.checkpoint import AveragedWeights
from elit.training.logger import RunLog
from elit.training.task import Draws, FlowMatching, Task
from elit.training.train import load_data

ROWS = 64  # samples of a validation


class DistillTask(Task):
    """A transformer that learns beside its original: the same weights inside `original()`, or a copy, `teacher`."""

    config: DistillConfig
    network: Model

    def __init__(self, config: DistillConfig, accelerator: Accelerator, network: Model, *, keep_original: bool):
        """Adds interface and low-rank changes to `network`, and lets gradients reach what is trained."""
        self.config, self.accelerator, self.network, self.teacher = config, accelerator, network, network
        if keep_original:
            self.teacher = copy.deepcopy(network).requires_grad_(False).eval().to(accelerator.device)
        place = {name: getattr(config, name) for name in ("read_after", "write_after", "window", "mode")}
        rank = config.lora_rank if config.weights == "lora" else 0
        if config.init is None:
            elastify(network, **place, seed=config.seed)
        elif put_add_on(network, config.init) is not None:
            raise ValueError(f"init must be an add-on, got {config.init!r}, a transformer of its own weights")
        else:
            record = network.elastic_record
            for name, value in (place | {"lora_rank": rank}).items():
                own = getattr(record, name)
                require(
                    value in (None, own) or (name == "lora_rank" and not own), name, value, f"{own}, as init has it"
                )
        network.elastic.float()  # whatever the precision of the rest
        if rank > network.elastic_record.lora_rank:
            add_low_rank(network, rank, seed=config.seed)
        for module in network.modules():  # the teacher drops nothing, and a resumed run repeats itself
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif hasattr(module, "dropout_prob"):  # DiT's labels
                module.dropout_prob = 0.0
        network.requires_grad_(config.weights == "all")
        network.elastic.requires_grad_()
        network.elastic_record = replace(
            network.elastic_record,
            lora_rank=rank,
            original_at_full=config.weights != "all",
            base=str(Path(config.pipeline).resolve()) if Path(config.pipeline).is_dir() else config.pipeline,
            base_options={"variant": config.variant, "revision": config.revision},
        )
        family, blocks = family_of(network), all_blocks(network)
        self.blocks = [*(part for block in blocks for part in family.called_outside(block)), *blocks]
        budgets = network.budgets if config.weights == "all" else network.budgets[:-1]  # there the original runs
        self.budgets = training_budgets(budgets, config.budget_min, config.budget_max)

    def step_flops(self, *, teacher: bool, **sizes: Any) -> dict[int | None, int]:
        """FLOPs of a sample's step at each budget. teacher: the original runs in it too."""
        passes = 3 if self.config.weights == "all" else 2  # no gradients of weights that stay
        beside = count_block_flops(self.network, **sizes, interface=False) if teacher else 0
        counts = self.network.budgets
        return {count: beside + passes * count_block_flops(self.network, **sizes, budget=count) for count in counts}

    def validated_budgets(self) -> list[int]:
        """All, a half, a quarter and an eighth of a window's tokens."""
        full = self.network.budgets[-1]
        return list(dict.fromkeys(max(1, round(full * share)) for share in (1.0, 0.5, 0.25, 0.125)))

    def objective(self, accelerator: Accelerator) -> "DistillTask":
        return self


class DistillNetwork(DistillTask):
    """A DiT of this library: ‖v − (X1 − X0)‖² + `distillation` · ‖v − v_teacher‖², the teacher at all tokens."""

    def __init__(self, config: DistillConfig, accelerator: Accelerator):
        if config.data is None:
            raise ValueError("data must be given for a network of this library: digits, or whatever it was trained on")
        network = load_own(config.pipeline, torch_dtype=torch.float32)
        self.examples = load_data(TrainConfig(data=config.data, image_size=network.sample_size[-1]))
        shape = (network.config.in_channels, *network.sample_size)
        if tuple(self.examples.shape) != shape:
            raise ValueError(f"data must have samples of shape {shape}, got {tuple(self.examples.shape)}")
        super().__init__(config, accelerator, network, keep_original=config.weights == "all")
        self.flops = self.step_flops(tokens=(network.token_grid(network.sample_size),), teacher=True)
        rank, world = accelerator.process_index, accelerator.num_processes
        self.sampler = StepSampler(len(self.examples), config, rank=rank, world=world)
        self.flow = FlowMatching(
            config=TrainConfig(seed=config.seed, batch_size=config.batch_size, class_dropout=config.prompt_dropout),
            shape=shape,
            device=accelerator.device,
            moments=isinstance(self.examples, LatentSet),
            drop_condition=network.conditioning.without,
            autocast=accelerator.autocast,
        )
        self.draw = self.flow.draw

    def initialize(self, *, resumed: bool) -> list[str]:
        self.before = self.distances(self.network.to(self.accelerator.device).eval())
        return []

    def losses(self, model: nn.Module, batch: Any, draws: Draws, budget: int | None) -> tuple[Tensor, Tensor]:
        images, y, noise, t, x = self.flow.noised(batch, draws)
        with self.accelerator.autocast():
            with torch.no_grad(), original():
                wanted = self.teacher(x, t, y)
            velocity = model(x, t, y, budget)
        distance = mean_square(velocity.float() - wanted.float())
        return t, flow_matching_loss(velocity, noise, images) + self.config.distillation * distance

    def preview(self, accelerator: Accelerator, average: AveragedWeights, log: RunLog, step: int) -> None:
        """None: what it learned is measured before and after."""

    def distances(self, network: Model) -> dict[int, float]:
        """Root mean squared distance of the velocity to the original's on fixed samples, by budget."""
        generator, device = torch.Generator().manual_seed(self.config.seed), self.accelerator.device
        images, y = self.examples.__getitems__([i * len(self.examples) // ROWS for i in range(ROWS)])
        images = images[:, 0] if self.flow.moments else images  # the mean
        t = torch.linspace(0.02, 0.98, ROWS)
        x = interpolate(torch.randn(images.shape, generator=generator), images, t)
        x, t, y = (part.to(device) for part in (x, t, y))
        with torch.no_grad():
            with original():
                wanted = self.teacher(x, t, y)
            counts = self.validated_budgets()
            return {count: (network(x, t, y, count) - wanted).square().mean().sqrt().item() for count in counts}

    def finish(self, accelerator: Accelerator, averages: Sequence[AveragedWeights]) -> dict[str, Any]:
        network = accelerator.unwrap_model(self.network, keep_fp32_wrapper=False)
        network.requires_grad_().eval()
        for average in reversed(averages):
            network.load_state_dict(average.whole(), strict=False)
            if accelerator.is_main_process:
                save_model(network, Path(self.config.out) / average.name)
        after, folder = self.distances(network), Path(self.config.out) / "model"
        full = network.budgets[-1]
        table = [
            {"tokens": count, "share": count / full, "distance_before": self.before[count], "distance": distance}
            for count, distance in after.items()
        ]
        return {"out": self.config.out, "model": str(folder), "validation": table}


def mean_square(difference: Tensor) -> Tensor:
    """The mean of each sample (B,)."""
    return difference.square().flatten(1).mean(1)
