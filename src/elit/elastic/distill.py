"""Distillation: an elastified transformer learns to be, at every budget, what its original is at all tokens.

The original is the same weights without interface and low-rank changes, inside `original()`, and was recorded while the
pipeline itself ran; so no second copy of it is needed. With pictures it runs beside them: a copy where all weights are
trained.
"""

import copy
import hashlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor

from elit.config import DistillConfig
from elit.data.loader import BucketSampler
from elit.elastic.captioned_images import CaptionedImages, aspect_sizes
from elit.elastic.context import UNSET, budget, original
from elit.elastic.cost import step_flops
from elit.elastic.distill_network import (
    DistillNetwork,
    prepare_student,
    student_budgets,
    validated_budgets,
)
from elit.elastic.distill_objectives import DistanceToTeacher, PicturesAndTeacher, Prediction
from elit.elastic.families import all_blocks, family_of
from elit.elastic.families.family import Model
from elit.elastic.pipelines import Requests, load_pipeline, read_prompts
from elit.elastic.recording import (
    CallBatch,
    RecordedCalls,
    encoded_prompts,
    first_call,
    free_text_encoders,
    output_tensor,
    record as record_calls,
    save_calls,
)
from elit.elastic.storage import save_add_on
from elit.elastic.trees import Tree, layout_of
from elit.files import write_text
from elit.models.saved import MANIFEST
from elit.sampling.pictures import image_grid
from elit.training.checkpoint import AveragedWeights
from elit.training.logger import RunLog
from elit.training.loop import train_task
from elit.training.task import Task

ROWS, TIMES = 32, 5
Row = dict[str, Any]
"""Distances at one budget, by name."""


def distill(config: DistillConfig) -> dict[str, Any]:
    """Trains as `config` sets it; returns the last validation. Resumes, stops and raises as `train_task`."""
    if not config.pipeline:
        raise ValueError("pipeline must be given: elit distill PIPELINE OUT --prompts FILE")
    own = any((Path(config.pipeline) / name).is_file() for name in ("config.json", MANIFEST))  # a network or checkpoint
    task = DistillNetwork if own else DistillPipeline
    return train_task(config, lambda accelerator: task(config, accelerator))


class DistillPipeline(Task):
    """The transformer of a diffusers pipeline, on trajectories of the pipeline itself, or on pictures."""

    config: DistillConfig
    network: Model
    sampler: BucketSampler
    examples: RecordedCalls | CaptionedImages

    def __init__(self, config: DistillConfig, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        prompts = [] if config.data else read_prompts(config.prompts)
        self.pipe = load_pipeline(config, accelerator.device)
        self.network = network = self.pipe.transformer
        self.family, blocks = family_of(network), all_blocks(network)
        self.blocks = [*(part for block in blocks for part in self.family.called_outside(block)), *blocks]
        self.images = CaptionedImages(config, self.pipe, self.family) if config.data else None
        if self.images is not None:
            prompts, self.prediction = self.images.prompts, Prediction.of(self.pipe, self.family)
        self.requests = Requests(self.pipe, config, prompts)
        set_seed(config.seed)
        # If all weights move, pictures need the original beside them; trajectories hold its outputs.
        keep = config.weights == "all" and self.images is not None
        self.teacher = copy.deepcopy(network).requires_grad_(False).eval() if keep else network
        if keep and config.precision == "bf16":
            self.teacher.bfloat16()
        prepare_student(network, config)
        network.elastic.float()  # whatever the precision of the rest
        self.budgets = student_budgets(network, config)
        self.last_table: list[Row] | None = None

    @property
    def cache(self) -> Path:
        """Named by what is recorded in it, so that other settings are another folder."""
        config = self.config
        names = ["pipeline", "sizes", "call", "teacher_batch", "preview_prompts", "seed", "teacher_steps"]
        names += ["data", "prompt_dropout"] if self.images is not None else ["trajectories"]
        settings = [getattr(config, name) for name in names]
        settings += [self.requests.prompts, str(self.network.dtype)]
        return Path(config.out) / "cache" / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]

    def initialize(self, *, resumed: bool) -> list[str]:
        """Records the original and encodes pictures, whatever is not there yet; the processes share the work."""
        accelerator, config, requests = self.accelerator, self.config, self.requests
        rank, world = accelerator.process_index, accelerator.num_processes
        with encoded_prompts(self.pipe, self.cache / "prompts"):
            self.try_step()
            if requests.sides:
                requests.sizes += self.sizes_of_windows()
            self.examples = self.record(rank, world) if self.images is None else self.encode(self.images, rank, world)
            self.sampler = BucketSampler(self.examples.buckets, config, rank=rank, world=world)
            # Before a checkpoint's weights are read: the network is still the original.
            self.fixed = self.fixed_calls()
            if config.preview_every:
                with torch.no_grad(), original():
                    self.reference = self.samples()
        call = self.fixed[1].arguments
        tokens, text = self.family.grids(self.network, call), self.family.text(self.network, call)
        self.flops = step_flops(self.network, config, tokens, text, teacher=self.images is not None)
        trained = sum(weight.numel() for weight in self.network.parameters() if weight.requires_grad)
        kind, buckets = "pictures" if self.images is not None else "recorded calls", len(self.examples.buckets)
        return [f"{len(self.examples):,} {kind} in {buckets} buckets; {trained:,} weights to train"]

    def try_step(self) -> None:
        """A forward and backward pass at the lowest budget: a run that cannot train fails before it records."""
        size = (max(self.requests.sides),) * 2 if self.requests.sides else None
        call = first_call(self.pipe, self.requests.request(self.requests.prompts[:1], number=0, steps=1, size=size))
        with budget(self.budgets[0], doubled=False), self.accelerator.autocast():
            output_tensor(self.network(**call)).float().sum().backward()
        self.network.zero_grad(set_to_none=True)

    def record(self, rank: int, world: int) -> RecordedCalls:
        """Every `world`-th batch from `rank`: first its prompts, all of them, then the transformer's calls."""
        prompts, steps = self.requests.prompts[: self.config.teacher_batch], self.config.teacher_steps
        # The last is for validation, from noise that no other starts from.
        held_out = self.requests.request(prompts, number=-1, steps=steps, size=self.requests.sizes[0])
        requests = [*self.requests.batches(), held_out]
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

    def encode(self, images: CaptionedImages, rank: int, world: int) -> CaptionedImages:
        """Latents by all processes, the captions' calls by the first."""
        wait = self.accelerator.wait_for_everyone
        images.encode(self.cache, self.requests, rank, world, wait)
        first_call(self.pipe, self.requests.validation())
        if rank == 0:
            images.record_captions(self.cache, self.requests, self.layout())
        wait()
        free_text_encoders(self.pipe)
        images.read_captions(self.cache)
        return images

    def sizes_of_windows(self) -> list[tuple[int, int]]:
        """For `sizes` of one number: whatever the windows divide."""
        side = max(self.requests.sides)
        request = self.requests.request(self.requests.prompts[:1], number=0, steps=1, size=(side, side))
        rows, columns = self.family.grids(self.network, first_call(self.pipe, request))[0][-2:]
        window = self.network.elastic_record.window[-2:]
        multiple = (side // rows * window[0], side // columns * window[1])
        return [size for each in self.requests.sides for size in aspect_sizes(each, multiple)]

    def layout(self) -> Tree:
        """Which of the transformer's arguments have an entry a sample."""
        one = two = first_call(self.pipe, self.requests.request(self.requests.prompts[:1], number=0, steps=1))
        if self.config.teacher_batch > 1:  # else the pipeline may be one that takes a prompt at a time, Wan VACE's
            two = first_call(self.pipe, self.requests.request(self.requests.prompts[:1] * 2, number=0, steps=1))
        sample = self.family.sample
        return layout_of(one, two, (len(one[sample]), len(two[sample])))

    def objective(self, accelerator: Accelerator) -> DistanceToTeacher | PicturesAndTeacher:
        if not isinstance(self.examples, CaptionedImages):
            return DistanceToTeacher(noise=self.family.noise, autocast=accelerator.autocast)
        return PicturesAndTeacher(
            config=self.config,
            examples=self.examples,
            sampler=self.sampler,
            prediction=self.prediction,
            teacher=self.teacher.to(accelerator.device),
            device=accelerator.device,
            autocast=accelerator.autocast,
        )

    def fixed_calls(self) -> tuple[Tensor, CallBatch]:
        """Calls to validate with, and the original's predictions for them."""
        held_out = self.examples if self.images is not None else RecordedCalls(self.cache / "held-out")
        bucket, device = max(held_out.buckets, key=len), self.accelerator.device
        rows = [int(bucket[i * len(bucket) // ROWS]) for i in range(min(ROWS, len(bucket)))]
        first, call = held_out.__getitems__(rows)
        first, call = first.to(device), call.to(device)
        objective = self.objective(self.accelerator)
        if isinstance(objective, DistanceToTeacher):
            return first, call
        noise = torch.randn(first[:, 0].shape, generator=torch.Generator().manual_seed(self.config.seed)).to(device)
        t = (torch.arange(len(first), device=device) + 0.5) / len(first)
        arguments, _ = objective.call((first, call), (noise, t, torch.zeros_like(noise)))
        return objective.wanted(arguments), CallBatch(arguments)

    def preview(self, accelerator: Accelerator, average: AveragedWeights, log: RunLog, step: int) -> None:
        """The same prompts and seeds at each budget beside the original, and the distance of each budget to it."""
        with (
            average.in_place_of(self.network),
            encoded_prompts(self.pipe, self.cache / "prompts"),
            accelerator.autocast(),
        ):
            picture, table = self.measure()
        if accelerator.is_main_process:
            if picture is not None:
                log.image(picture, step)
            path = Path(self.config.out) / "samples" / f"step-{step:08d}.json"
            write_text(path, json.dumps(table, indent=1) + "\n")
            self.last_table = table

    def measure(self) -> tuple[Image.Image | None, list[Row]]:
        """A picture, a row a budget below the original's, and a table; no picture where samples are none."""
        pictures, table = [self.reference], []
        with torch.no_grad():
            for count in validated_budgets(self.network.budgets):
                row: Row = {"tokens": count, "share": count / self.network.budgets[-1], **self.distances(count)}
                for name, weak in (("", UNSET), ("_ccfg", 1))[: 1 + self.requests.guided]:
                    with budget(count, guidance=weak):
                        pictures.append(self.samples())
                    difference = pictures[-1].float() - self.reference.float()
                    row[f"picture_distance{name}"] = difference.square().mean().sqrt().item()
                table.append(row)
        sheet = torch.cat(pictures)
        if sheet.ndim != 4 or sheet.shape[1] not in (1, 3):
            return None, table
        scale = max(1, 64 // sheet.shape[-2])
        return image_grid(sheet.float().cpu() * 2 - 1, len(self.reference), scale=scale), table

    def samples(self) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] by the pipeline, always of the same seeds; of a clip one frame."""
        output = self.pipe(**self.requests.validation(output_type="pt"))
        samples = torch.as_tensor(output.images if hasattr(output, "images") else output.frames)
        samples = samples[:, 0] if samples.ndim == 5 else samples
        return samples[:, :3]  # Qwen-Image 2.1 has a fourth channel, of transparency

    def distances(self, count: int) -> Row:
        """Root mean squared distance of the prediction to the original's, over all fixed calls and by t."""
        objective = DistanceToTeacher(noise=self.family.noise, autocast=nullcontext)
        t, squared = objective.losses(self.network, self.fixed, (), count)
        bucket = (t * TIMES).long().clamp(max=TIMES - 1)
        by_time = [squared[bucket == i] for i in range(TIMES)]
        return {
            "distance": squared.mean().sqrt().item(),
            "distance_by_t": [part.mean().sqrt().item() if len(part) else None for part in by_time],
        }

    def finish(self, accelerator: Accelerator, average: AveragedWeights) -> dict[str, Any]:
        weights = average.whole()
        if accelerator.is_main_process:
            save_add_on(accelerator.unwrap_model(self.network), weights, Path(self.config.out))
        return {"out": self.config.out, "validation": self.last_table}
