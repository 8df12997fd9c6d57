"""Training of this library's networks from pictures, latents or captions: what `elit train` hands to the loop."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from elit.budgets import resolve_budget, training_budgets
from elit.config import TrainConfig, check_data, require
from elit.costs.flops import count_flops
from elit.data.builtin import named_images
from elit.data.images import ImageFiles, ImageSet, LatentSet, PromptedImages
from elit.data.loader import BucketSampler, StepSampler
from elit.data.source import open_source
from elit.models.conditioning import Condition, Text
from elit.models.presets import create_model, model_config
from elit.models.saved import load_shared_weights, save_model
from elit.models.text import CACHE, encode_prompts
from elit.models.transformer import Transformer
from elit.sampling.pictures import as_pictures, image_grid, label_sheet
from elit.sampling.sample import sample
from elit.training.checkpoint import AveragedWeights
from elit.training.distributed import broadcast_from_main, unsharded
from elit.training.logger import RunLog
from elit.training.loop import train_task
from elit.training.task import FlowMatching, Task

ImageData = ImageSet | ImageFiles | LatentSet
Scorer = Callable[[Transformer, RunLog, int], None]  # scores a network at a step, in all processes together


def train(config: TrainConfig, make_scorer: Callable[["TrainNetwork"], Scorer] | None = None) -> Transformer:
    """Trains and saves `config.out`/model; gives that network, averaged, on the CPU. make_scorer: for `score_every`."""
    require(not config.score_every or make_scorer is not None, "score_every", config.score_every, "0 without a scorer")
    return train_task(config, lambda accelerator: TrainNetwork(config, accelerator, make_scorer))


class TrainNetwork(Task):
    """A network of this library, from random weights or those of `config.init`, by flow matching."""

    config: TrainConfig
    network: Transformer
    scorer: Scorer | None = None

    def __init__(self, config: TrainConfig, accelerator: Accelerator, make_scorer: Any = None):
        self.make_scorer = make_scorer
        broadcast_from_main(accelerator, lambda: self.load(config, accelerator.device))
        if not accelerator.is_main_process:  # what the main process has read and encoded is kept
            self.load(config, accelerator.device)
        self.config = config = resolve(config, self.data, self.prompts)
        rank, world, count = accelerator.process_index, accelerator.num_processes, len(self.data)
        flips = not (config.horizontal_flip and isinstance(self.data, LatentSet))
        require(flips, "horizontal_flip", True, "left out for latents: a mirrored latent is no mirrored picture")
        held_out = max(2, round(count * config.validation_share)) if config.validation_share else 0
        self.held_out = np.arange(held_out) * count // max(1, held_out)
        self.sampler = StepSampler(count, config, rank=rank, world=world)
        if held_out:
            rest = np.setdiff1d(np.arange(count), self.held_out)
            self.sampler = BucketSampler([rest], config, rank=rank, world=world)
        self.identity = {"count": count, "stamp": self.data.stamp}
        names: dict[str, Any] = {}
        if self.prompts is None:
            names = {"class_names": tuple(self.data.classes)}
            self.identity["classes"] = list(self.data.classes)
        set_seed(config.seed)
        self.network = network = create_model(**config.model.arguments(), **names)
        self.blocks = network.blocks
        self.budgets = training_budgets(network.budgets, config.budget_min, config.budget_max)
        self.flops = {budget: 3 * count_flops(network, budget=budget) for budget in network.budgets or (None,)}
        self.examples = self.data if self.prompts is None else PromptedImages(self.data, self.prompts)

    def load(self, config: TrainConfig, device: torch.device) -> None:
        self.data = load_data(config)
        self.prompts = load_prompts(config, self.data, device)

    def initialize(self, *, resumed: bool) -> list[str]:
        if self.config.score_every:
            self.scorer = self.make_scorer(self)
        if resumed:
            return []
        notes = self.data.summary() if isinstance(self.data, ImageFiles) else []
        if self.config.init:
            parts, kinds = [], ("weights start anew", "left out")
            for kind, names in zip(kinds, load_shared_weights(self.network, self.config.init), strict=True):
                modules = ", ".join(dict.fromkeys(name.rpartition(".")[0] or name for name in names)) or "none"
                parts.append(f"{len(names)} {kind} ({modules})")
            notes.append(f"init: {'; '.join(parts)}")
        return notes

    def objective(self, accelerator: Accelerator) -> FlowMatching:
        return FlowMatching(
            config=self.config,
            shape=self.data.shape,
            device=accelerator.device,
            moments=isinstance(self.data, LatentSet),
            drop_condition=self.network.conditioning.without,
            autocast=accelerator.autocast,
        )

    def preview(self, accelerator: Accelerator, average: AveragedWeights, log: RunLog, step: int) -> None:
        """Samples from the averaged weights, a row a budget (all, half, a quarter, the least), of the same noise."""
        network = self.network
        numbers = torch.arange(8) % len(self.data.classes)
        y: Condition = numbers if self.prompts is None else self.prompts[numbers]
        wanted = (None, 0.5, 0.25, network.budgets[0]) if network.budgets else ()
        budgets = list(dict.fromkeys(resolve_budget(budget, network.budgets) for budget in wanted)) or [None]
        with average.in_place_of(network), torch.compiler.set_stance("force_eager"), accelerator.autocast():
            rows = [as_pictures(sample(network, y, budget=budget)[:, :3]) for budget in budgets]
        sheet = image_grid(torch.cat(rows), len(y), scale=max(1, 64 // rows[0].shape[-2]))
        names = self.data.classes if self.prompts is None else self.data.captions
        labels = ["" if budget is None else f"{budget} latent{'s' * (budget > 1)}" for budget in budgets]
        log.image(label_sheet(sheet, labels, [names[number] for number in numbers.tolist()]), step)

    def score(self, average: AveragedWeights, log: RunLog, step: int) -> None:
        if self.scorer and (step % self.config.score_every == 0 or step == self.config.steps):
            self.scorer(self.averaged(average), log, step)

    def finish(self, accelerator: Accelerator, averages: Sequence[AveragedWeights]) -> Transformer:
        networks = [self.averaged(average) for average in averages]
        for average, network in zip(averages, networks, strict=True):
            if accelerator.is_main_process:
                save_model(network, Path(self.config.out) / average.name)
        return networks[0]

    def averaged(self, average: AveragedWeights) -> Transformer:
        """A network of averaged weights, whole, on the CPU; every process must call it."""
        with torch.random.fork_rng(devices=[]):
            network = unsharded(self.network).eval()
        network.load_state_dict(average.whole())
        return network


def load_data(config: TrainConfig) -> ImageData:
    check_data(config.data)
    if (images := named_images(config.data)) is not None:
        return images
    root = Path(config.data)
    if (root / "encode.json").is_file():
        return LatentSet(root)
    source = open_source(root, captions=model_config(config.model.name)[0].takes_text)
    return ImageFiles(source, config.image_size, skip_unreadable=config.skip_unreadable)


def load_prompts(config: TrainConfig, data: ImageData, device: torch.device) -> Condition | None:
    """A row of `y` for each of the data's captions, kept beside a folder's images; None where classes are used."""
    model = config.model
    if not model_config(model.name)[0].takes_text:
        return None
    given = {"text_encoder": model.text_encoder, "text_length": model.text_length}
    _, settings = model_config(model.name.removeprefix("ELIT-"), **given)
    cache = data.folder and data.folder / CACHE
    encoder, length = settings["text_encoder"], settings["text_length"]
    return encode_prompts(data.captions, encoder, length=length, cache=cache, device=device)


def resolve(config: TrainConfig, data: ImageData, prompts: Condition | None) -> TrainConfig:
    """Fills in what the data decides: channels, size, classes or text. Raises ValueError where they clash."""
    channels, *size = data.shape
    model = config.model
    from_data: dict[str, Any] = {"in_channels": channels, "sample_size": size[0] if len(size) == 2 else tuple(size)}
    if isinstance(prompts, Text):
        pooled = 0 if prompts.pooled is None else prompts.pooled.shape[1]
        from_data |= {"text_features": prompts.embeddings.shape[2], "pooled_features": pooled}
    elif prompts is None:
        from_data["num_classes"] = max(len(data.classes), model.num_classes or 0)  # more than the data has are allowed
    for name, value in from_data.items():
        if getattr(model, name) not in (None, value):
            raise ValueError(f"model.{name}={getattr(model, name)}: the data has {value}; leave it out")
    return replace(config, model=replace(model, **from_data))
