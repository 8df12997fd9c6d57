"""Distillation: an elastified transformer learns to be, at every budget, what its original is at all tokens."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor, nn

from elit.config import DistillConfig
from elit.costs.timing import timed
from elit.data.images import posterior_sample
from elit.data.loader import BucketSampler
from elit.elastic.captioned_images import ROWS, CaptionedImages
from elit.elastic.context import UNSET, budget, original
from elit.elastic.cost import count_block_flops
from elit.elastic.distill_network import DistillNetwork, DistillTask, mean_square
from elit.elastic.families import family_of
from elit.elastic.families.family import Arguments, Family, Tree
from elit.elastic.load import save_add_on
from elit.elastic.pipelines import (
    TIMES,
    CallBatch,
    RecordedCalls,
    Requests,
    encoded_prompts,
    first_call,
    free_text_encoders,
    layout_of,
    load_pipeline,
    output_tensor,
    read_prompts,
    record as record_calls,
    save_calls,
)
from elit.files import Json, write_text
from elit.flow.path import interpolate, logit_normal
from elit.models.saved import MANIFEST
from elit.sampling.pictures import image_grid, label_sheet
from elit.training.checkpoint import AveragedWeights
from elit.training.logger import RunLog
from elit.training.loop import train_task
from elit.training.task import Draws

PARTS = 5  # of the time, by which the distances of a validation are listed


def distill(config: DistillConfig) -> Json:
    """Trains as `config` sets it; returns the last validation. Resumes, stops and raises as `train_task`."""
    if not config.pipeline:
        raise ValueError("pipeline must be given: elit distill PIPELINE OUT --prompts FILE")
    own = any((Path(config.pipeline) / name).is_file() for name in ("config.json", MANIFEST))  # a network or checkpoint
    task = DistillNetwork if own else DistillPictures if config.data else DistillPipeline
    if task is DistillPipeline:
        read_prompts(config.prompts)  # before a pipeline is loaded
    return train_task(config, lambda accelerator: task(config, accelerator))


class DistillPipeline(DistillTask):
    """The transformer of a diffusers pipeline: ‖v − v_teacher‖², whatever v is, on the pipeline's trajectories."""

    sampler: BucketSampler
    examples: RecordedCalls | CaptionedImages

    def __init__(self, config: DistillConfig, accelerator: Accelerator):
        self.config = config
        self.pipe = load_pipeline(config, accelerator.device)
        self.family = family_of(self.pipe.transformer)
        self.requests = Requests(self.pipe, config, self.prompts())
        set_seed(config.seed)
        # If all weights move, pictures need the original beside them; trajectories hold its outputs.
        keep = config.weights == "all" and bool(config.data)
        super().__init__(config, accelerator, self.pipe.transformer, keep_original=keep)
        if keep and config.precision == "bf16":
            self.teacher.bfloat16()
        record = self.network.elastic_record
        self.network.elastic_record = replace(record, size=self.requests.sizes[0])
        self.last_table: list[Json] | None = None

    def prompts(self) -> list[str]:
        prompts = read_prompts(self.config.prompts)
        self.identity = {"count": len(prompts), "source": hashlib.sha256("\n".join(prompts).encode()).hexdigest()}
        return prompts

    @property
    def cache(self) -> Path:
        """Named by what is recorded in it, so that other settings are another folder."""
        pictures = bool(self.config.data)
        names = ["pipeline", "sizes", "call", "teacher_batch", "preview_prompts", "seed", "teacher_steps"]
        names += ["data", "prompt_dropout"] if pictures else ["trajectories"]
        settings = [getattr(self.config, name) for name in names]
        settings += [self.requests.prompts, str(self.network.dtype), *[self.identity] * pictures]
        return Path(self.config.out) / "cache" / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]

    def initialize(self, *, resumed: bool) -> list[str]:
        """Records the original and encodes pictures, whatever is not there yet; the processes share the work."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        with encoded_prompts(self.pipe, self.cache / "prompts"):
            self.try_step()
            self.examples = self.record(rank, world)
            self.sampler = BucketSampler(self.examples.buckets, self.config, rank=rank, world=world)
            # Before a checkpoint's weights are read: the network is still the original.
            self.fixed = self.fixed_calls()
            if self.config.preview_every:
                with torch.no_grad(), original():
                    self.reference = self.samples()
        call = self.fixed[1].arguments
        self.sizes = {
            "tokens": self.family.grids(self.network, call),
            "text_tokens": self.family.text(self.network, call),
        }
        self.flops = self.step_flops(**self.sizes, teacher=bool(self.config.data))
        trained = sum(weight.numel() for weight in self.network.parameters() if weight.requires_grad)
        count, buckets = self.sampler.length, len(self.examples.buckets)
        return [f"{count:,} examples in {buckets} buckets; {trained:,} weights to train"]

    def try_step(self) -> None:
        """A forward and backward pass at the lowest budget: a run that cannot train fails before it records."""
        call = first_call(self.pipe, self.requests.request(self.requests.prompts[:1]))
        with budget(self.budgets[0], doubled=False), self.accelerator.autocast():
            output_tensor(self.network(**call)).float().sum().backward()
        self.network.zero_grad(set_to_none=True)

    def record(self, rank: int, world: int) -> RecordedCalls | CaptionedImages:
        """Every `world`-th batch from `rank`: first its prompts, all of them, then the transformer's calls."""
        batch = min(self.config.teacher_batch, len(self.requests.prompts))
        requests = [*self.requests.batches(), self.requests.validation(batch)]  # the last is held out
        paths = [self.cache / "calls" / f"{number:06d}.pt" for number in range(len(requests) - 1)]
        paths.append(self.cache / "held-out" / "calls.pt")
        mine = list(zip(requests, paths, strict=True))[rank::world]
        missing = [(request, path) for request, path in mine if not path.is_file()]
        for request in [self.requests.validation(), *(request for request, _ in missing)]:
            first_call(self.pipe, request)
        layout = self.layout() if missing else None
        self.accelerator.wait_for_everyone()
        free_text_encoders(self.pipe)
        for request, path in missing:
            save_calls(path, record_calls(self.pipe, request), layout)
        self.accelerator.wait_for_everyone()
        return RecordedCalls(self.cache / "calls")

    def layout(self) -> Tree:
        """A tree that is True for the transformer's arguments with an entry a sample."""
        one = two = first_call(self.pipe, self.requests.request(self.requests.prompts[:1]))
        if self.config.teacher_batch > 1:  # else the pipeline may be one that takes a prompt at a time, Wan VACE's
            two = first_call(self.pipe, self.requests.request(self.requests.prompts[:1] * 2))
        sample = self.family.sample
        return layout_of(one, two, (len(one[sample]), len(two[sample])))

    def draw(self, step: int) -> Draws:
        return ()

    def losses(self, model: nn.Module, batch: Any, draws: Draws, budget_: int | None) -> tuple[Tensor, Tensor]:
        wanted, call = batch
        return self.distance(model, wanted, call, budget_)

    def distance(self, model: nn.Module, wanted: Tensor, call: CallBatch, budget_: int | None) -> tuple[Tensor, Tensor]:
        """Times and squared distances (B,) of predictions to recorded ones."""
        with budget(budget_, doubled=False), self.accelerator.autocast():
            output = output_tensor(model(**call.arguments))
        t = (1 - self.family.noise(call.arguments).float()).expand(len(wanted)).clamp(0, 1)
        return t, mean_square(output.float() - wanted.float())

    def fixed_calls(self) -> tuple[Tensor, CallBatch]:
        """Calls to validate with, and the original's predictions for them."""
        held_out = RecordedCalls(self.cache / "held-out")
        largest = max(held_out.buckets, key=len)
        return self.some_of(held_out, largest[:: -(-len(largest) // ROWS)])

    def some_of(self, examples: RecordedCalls | CaptionedImages, entries: np.ndarray) -> tuple[Tensor, CallBatch]:
        first, call = examples.__getitems__(entries.tolist())
        return first.to(self.accelerator.device), call.to(self.accelerator.device)

    def preview(self, accelerator: Accelerator, average: AveragedWeights, log: RunLog, step: int) -> None:
        """The same prompts and seeds at each budget beside the original, and the distance of each budget to it."""
        with (
            average.in_place_of(self.network),
            encoded_prompts(self.pipe, self.cache / "prompts"),
            accelerator.autocast(),
            torch.no_grad(),
        ):
            picture, table = self.measure()
        if accelerator.is_main_process:
            if picture is not None:
                log.image(picture, step)
            path = Path(self.config.out) / "samples" / f"step-{step:08d}.json"
            write_text(path, json.dumps(table, indent=1) + "\n")
            self.last_table = table

    def measure(self) -> tuple[Image.Image | None, list[Json]]:
        """A picture, a row a budget below the original's, and a table; no picture where samples are none."""
        pictures, labels, table = [self.reference], ["original"], []
        for count in self.validated_budgets():
            forward = partial(self.distance, self.network, *self.fixed, count)
            timed(forward, self.accelerator.device)  # warms up
            (t, squared), seconds = timed(forward, self.accelerator.device)
            part = (t * PARTS).long().clamp(max=PARTS - 1)
            by_time = [squared[part == i] for i in range(PARTS)]
            interface = self.config.weights == "all" or count < self.network.budgets[-1]  # else the original runs
            flops = count_block_flops(self.network, **self.sizes, budget=count, interface=interface)
            row: Json = {"tokens": count, "share": count / self.network.budgets[-1], "gflops": flops / 1e9}
            row["ms"] = 1e3 * seconds / len(squared)
            row["faster"] = (table or [row])[0]["ms"] / row["ms"]
            row["distance"] = squared.mean().sqrt().item()
            row["distance_by_t"] = [each.mean().sqrt().item() if len(each) else None for each in by_time]
            for name, weak in (("", UNSET), ("_ccfg", 1))[: 1 + self.requests.guided]:
                with budget(count, guidance=weak):
                    pictures.append(self.samples())
                labels.append(f"{count} tokens{', CCFG' if name else ''}")
                difference = pictures[-1].float() - self.reference.float()
                row[f"picture_distance{name}"] = difference.square().mean().sqrt().item()
            table.append(row)
        sheet = torch.cat(pictures)
        if sheet.ndim != 4 or sheet.shape[1] not in (1, 3):
            return None, table
        scale = max(1, 64 // sheet.shape[-2])
        grid = image_grid(sheet.float().cpu() * 2 - 1, len(self.reference), scale=scale)
        return label_sheet(grid, labels), table

    def samples(self) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] by the pipeline, always of the same seeds; of a clip one frame."""
        output = self.pipe(**self.requests.validation(output_type="pt"))
        samples = torch.as_tensor(output.images if hasattr(output, "images") else output.frames)
        samples = samples[:, 0] if samples.ndim == 5 else samples
        return samples[:, :3]  # Qwen-Image 2.1 has a fourth channel, of transparency

    def finish(self, accelerator: Accelerator, averages: Sequence[AveragedWeights]) -> Json:
        for average in reversed(averages):
            weights, name = average.whole(), "" if average is averages[0] else average.name
            if accelerator.is_main_process:
                save_add_on(accelerator.unwrap_model(self.network), weights, Path(self.config.out) / name)
        return {"out": self.config.out, "validation": self.last_table}


class DistillPictures(DistillPipeline):
    """The class's own training loss on pictures + `distillation` · ‖v − v_teacher‖², the teacher at all tokens."""

    images: CaptionedImages

    def prompts(self) -> list[str]:
        self.images = CaptionedImages(self.config, self.pipe)
        self.identity = self.images.source.identity
        self.prediction = Prediction(self.pipe.scheduler, self.family)
        return self.images.prompts

    def record(self, rank: int, world: int) -> CaptionedImages:
        """Latents by all processes, the captions' calls by the first."""
        first_call(self.pipe, self.requests.validation())
        self.images.prepare(self.cache, self.requests, self.layout, self.accelerator)
        free_text_encoders(self.pipe)
        return self.images

    def draw(self, step: int) -> Draws:
        """Noise (B, C, ...), times (B,) and noise of the posteriors (B, C, ...)."""
        seed, device = random.Random(f"distill/{self.config.seed}/{step}").getrandbits(63), self.accelerator.device
        generator = torch.Generator(device).manual_seed(seed)
        shape = (self.config.batch_size, *self.images.shape(self.sampler.samples(step)[0]))
        noise, posterior = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
        if self.prediction.alphas is not None:
            return noise, torch.rand(shape[:1], generator=generator, device=device), posterior
        normal = torch.randn(shape[:1], generator=generator, device=device)
        return noise, logit_normal(normal, self.config.time_shift), posterior

    def losses(self, model: nn.Module, batch: Any, draws: Draws, budget_: int | None) -> tuple[Tensor, Tensor]:
        arguments, target = self.noised(batch, draws)
        wanted = self.wanted(arguments)
        with self.accelerator.autocast(), budget(budget_, doubled=False):
            output = output_tensor(model(**arguments)).float()
        losses = self.config.distillation * mean_square(output - wanted)
        if not isinstance(arguments.get("guidance"), Tensor):
            predicted = output[:, : target.shape[1]]  # DiT and PixArt have variances behind it
            losses = losses + mean_square(predicted - target.float())
        return draws[1], losses

    def wanted(self, arguments: Arguments) -> Tensor:
        """The original's prediction."""
        with torch.no_grad(), original(), self.accelerator.autocast():
            return output_tensor(self.teacher(**arguments)).float()

    def noised(self, batch: Any, draws: Draws) -> tuple[Arguments, Tensor]:
        """Arguments of a forward, and its target in the class's own training."""
        (moments, call), (noise, t, posterior), pack = batch, draws, self.family.pack
        assert pack is not None
        return self.prediction.call(pack(posterior_sample(moments, posterior)), pack(noise), t, call)

    def fixed_calls(self) -> tuple[Tensor, CallBatch]:
        moments, call = self.some_of(self.images, self.images.held_out)
        generator = torch.Generator().manual_seed(self.config.seed)
        noise = torch.randn(moments[:, 0].shape, generator=generator).to(moments.device)
        t = (torch.arange(len(moments), device=moments.device) + 0.5) / len(moments)
        arguments, _ = self.noised((moments, call), (noise, t, torch.zeros_like(noise)))
        return self.wanted(arguments), CallBatch(arguments)


class Prediction:
    """The target of a class of transformers for a noisy sample, made of latents and noise."""

    def __init__(self, scheduler: Any, family: Family):
        name, self.family = type(scheduler).__name__, family
        self.kind = scheduler.config.get("prediction_type", "epsilon")
        self.alphas: Tensor | None = None
        if not name.startswith("FlowMatch") and self.kind != "flow_prediction":
            if not hasattr(scheduler, "alphas_cumprod") or self.kind not in ("epsilon", "v_prediction", "sample"):
                kind = f"a {name} with prediction_type={self.kind!r}"
                raise ValueError(f"data: not supported for {kind}; distil this pipeline with prompts")
            self.alphas = torch.as_tensor(scheduler.alphas_cumprod, dtype=torch.float32)

    def call(self, x: Tensor, noise: Tensor, t: Tensor, call: CallBatch) -> tuple[Arguments, Tensor]:
        """Arguments of a forward at time t (B,), 0 = noise, 1 = data, and its target; x, noise: packed, (B, ...)."""
        arguments, sample = dict(call.arguments), self.family.sample
        name = next(name for name in TIMES if name in arguments)
        if self.alphas is None:
            ends = [self.family.noise(arguments | {name: torch.tensor(time)}).flatten()[0] for time in (0.0, 1.0)]
            low, high = map(float, ends)
            noisy, target = interpolate(noise, x, t), noise - x if high > low else x - noise
            time = (1 - t - low) / (high - low)
        else:
            time = ((1 - t) * len(self.alphas)).long().clamp(max=len(self.alphas) - 1)
            alpha = self.alphas.to(x.device)[time].view(-1, *[1] * (x.ndim - 1))
            noisy = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
            velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * x
            target = {"epsilon": noise, "v_prediction": velocity, "sample": x}[self.kind]
        arguments[name] = time.to(arguments[name].dtype)
        arguments[sample] = list(noisy.unbind()) if self.family.listed else noisy
        return arguments, target
