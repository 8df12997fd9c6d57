"""Distillation: an elastified transformer learns to be, at every budget, what its original is at all tokens.

The original is the same weights without interface and low-rank changes, inside `original()`, and was recorded while the
pipeline itself ran; so no second copy of it is needed. With pictures it runs beside them: a copy where all weights are
trained.
"""

import copy
import hashlib
import json
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from elit.budgets import training_budgets
from elit.config import DistillConfig
from elit.data.sampler import BucketSampler
from elit.elastic.add_on import save_add_on
from elit.elastic.call_files import CallBatch, RecordedCalls, save_calls
from elit.elastic.distill_objectives import DistanceToTeacher, PicturesAndTeacher, Prediction
from elit.elastic.families import all_blocks, family_of
from elit.elastic.low_rank import add_low_rank
from elit.elastic.pictures import CaptionedLatents, Pictures, aspect_sizes
from elit.elastic.pipelines import Requests, check_pipeline, load_pipeline, read_prompts
from elit.elastic.recording import (
    arguments_by_row,
    encoded_prompts,
    first_call,
    free_text_encoders,
    nested,
    output_tensor,
)
from elit.elastic.recording import record as record_calls
from elit.elastic.runtime import original
from elit.elastic.surgery import elastify
from elit.elastic.validation import ROWS, Validation
from elit.files import write_text
from elit.sampling.pictures import save_image
from elit.training.ema import AveragedWeights
from elit.training.logger import RunLog
from elit.training.loop import train_task
from elit.training.task import Task


def distill(config: DistillConfig) -> dict[str, Any]:
    """Trains what `config` says; returns what validation measured last. Resumes, stops and raises as `train_task`."""
    return train_task(config, lambda accelerator: DistillPipeline(config, accelerator))


class DistillPipeline(Task):
    """The transformer of a diffusers pipeline, on trajectories that the pipeline draws itself, or on pictures."""

    config: DistillConfig
    network: Any
    sampler: BucketSampler
    examples: RecordedCalls | CaptionedLatents

    def __init__(self, config: DistillConfig, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        check_pipeline(config.pipeline)
        self.pictures = None if config.data is None else Pictures(config)
        prompts = [] if self.pictures else read_prompts(config.prompts)
        self.pipe = load_pipeline(config, accelerator.device)
        self.network = network = self.pipe.transformer
        self.family, blocks = family_of(network), all_blocks(network)
        self.blocks = [*(part for block in blocks for part in self.family.called_outside(block)), *blocks]
        if self.pictures:
            self.pictures.open(self.pipe, self.family)
            prompts = self.pictures.prompts("class_labels" in Requests.parameters(self.pipe))
            self.prediction = Prediction.of(self.pipe, self.family)
        self.requests = Requests(self.pipe, config, prompts)
        set_seed(config.seed)
        # Where all weights move, pictures need the original beside them; of trajectories it has drawn what it says.
        keep = config.weights == "all" and self.pictures
        self.teacher = copy.deepcopy(network).requires_grad_(False).eval() if keep else network
        if keep and config.precision == "bf16":
            self.teacher.bfloat16()
        prepare_student(network, config)
        network.elastic.float()  # whatever the precision of the rest
        self.budgets = student_budgets(network, config)

    @property
    def cache(self) -> Path:
        """Named by what is recorded in it, so that other settings are another folder."""
        config = self.config
        names = ["pipeline", "sizes", "call", "teacher_batch", "preview_prompts", "seed", "teacher_steps"]
        names += ["trajectories"] if self.pictures is None else ["data", "prompt_dropout"]
        settings = [getattr(config, name) for name in names]
        settings += [self.requests.prompts, str(self.network.dtype)]
        return Path(config.out) / "cache" / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]

    def initialize(self, *, resumed: bool) -> list[str]:
        """Records the original and encodes pictures, whatever is not there yet; the processes share the work."""
        accelerator, config, requests = self.accelerator, self.config, self.requests
        rank, world = accelerator.process_index, accelerator.num_processes
        if accelerator.is_main_process:
            for other in self.cache.parent.glob("*"):
                if other != self.cache:
                    shutil.rmtree(other, ignore_errors=True)
        with self.prompts_on_disk():
            if requests.sides:
                requests.sizes += self.sizes_of_windows()
            self.examples = self.encode(rank, world) if self.pictures else self.record(rank, world)
            self.sampler = BucketSampler(
                self.examples.buckets,
                seed=config.seed,
                batch_size=config.batch_size,
                parts=config.gradient_accumulation,
                rank=rank,
                world=world,
                stop=config.steps,
            )
            # Before a checkpoint's weights are read: the network is still the original.
            self.validation = Validation(self.pipe, requests, *self.probe())
            if config.preview_every:
                self.validation.draw_reference()
        self.flops = self.validation.flops(3 if config.weights == "all" else 2, teacher=bool(self.pictures))
        trained = sum(weight.numel() for weight in self.network.parameters() if weight.requires_grad)
        kind = "pictures" if self.pictures else "recorded calls"
        buckets = len(self.examples.buckets)
        return [f"{len(self.examples):,} {kind} in {buckets} buckets; {trained:,} weights to train"]

    def prompts_on_disk(self) -> AbstractContextManager[None]:
        if not hasattr(self.pipe, "encode_prompt"):  # a pipeline of classes
            return nullcontext()
        return encoded_prompts(self.pipe, self.cache / "prompts")

    def record(self, rank: int, world: int) -> RecordedCalls:
        """Every `world`-th batch from `rank`: first its prompts, all of them, then what the transformer does."""
        requests = list(self.requests.batches())
        mine = [number for number in range(len(requests)) if number % world == rank]
        files = {number: self.cache / "calls" / f"{number:06d}.json" for number in mine}
        missing = [number for number in mine if not files[number].is_file()]
        for request in [self.requests.validation(), *(requests[number] for number in missing)]:
            first_call(self.pipe, request)
        if missing:
            by_row = self.arguments_by_row()
        self.accelerator.wait_for_everyone()
        free_text_encoders(self.pipe)
        for number in missing:
            calls = record_calls(self.pipe, requests[number])
            for branch, of_branch in calls.items():
                save_calls(files[number].with_suffix(f".{branch}.safetensors"), of_branch, by_row)
            write_text(files[number], json.dumps(sorted(calls)) + "\n")
        self.accelerator.wait_for_everyone()
        return RecordedCalls(self.cache / "calls")

    def encode(self, rank: int, world: int) -> CaptionedLatents:
        """Latents by all processes, the captions' calls by the first."""
        assert self.pictures is not None
        wait = self.accelerator.wait_for_everyone
        self.requests.sizes = list(self.pictures.sizes(self.requests.sizes))
        self.pictures.encode(self.cache, self.requests.sizes, rank, world, wait)
        first_call(self.pipe, self.requests.validation())
        if rank == 0:
            self.pictures.record_captions(self.cache, self.requests, self.arguments_by_row())
        wait()
        free_text_encoders(self.pipe)
        return self.pictures.examples(self.cache)

    def sizes_of_windows(self) -> list[tuple[int, int]]:
        """For `sizes` of one number: whatever the windows divide."""
        side = max(self.requests.sides)
        call = first_call(
            self.pipe, self.requests.request(self.requests.prompts[:1], number=0, steps=1, size=(side, side))
        )
        rows, columns = self.family.grids(self.network, nested(call))[0][-2:]
        window = self.network.elastic_record.window[-2:]
        multiple = (side // rows * window[0], side // columns * window[1])
        return [size for each in self.requests.sides for size in aspect_sizes(each, multiple)]

    def arguments_by_row(self) -> frozenset[str]:
        """Which of the transformer's arguments have an entry a sample."""
        one = two = first_call(self.pipe, self.requests.request(self.requests.prompts[:1], number=0, steps=1))
        if self.config.teacher_batch > 1:  # else the pipeline may be one that takes a prompt at a time, Wan VACE's
            two = first_call(self.pipe, self.requests.request(self.requests.prompts[:1] * 2, number=0, steps=1))
        return arguments_by_row(one, two, self.family.sample)

    # pyrefly: ignore[bad-override]
    def objective(self, accelerator: Accelerator) -> DistanceToTeacher | PicturesAndTeacher:
        if not isinstance(self.examples, CaptionedLatents):
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

    def probe(self) -> tuple[Tensor, CallBatch]:
        """Fixed calls that validation looks at, and what the original makes of them."""
        bucket = max(self.examples.buckets, key=len)
        batch = self.examples.__getitems__([bucket[i * len(bucket) // ROWS] for i in range(min(ROWS, len(bucket)))])
        device = self.accelerator.device
        first, call = batch[0].to(device), batch[1].to(device)
        if not isinstance(self.examples, CaptionedLatents):
            return first, call
        objective = self.objective(self.accelerator)
        assert isinstance(objective, PicturesAndTeacher)
        noise = torch.randn(first[:, 0].shape, generator=torch.Generator().manual_seed(self.config.seed)).to(device)
        t = (torch.arange(len(first), device=device) + 0.5) / len(first)
        arguments, _ = objective.call((first, call), (noise, t, torch.zeros_like(noise)))
        with torch.no_grad(), original(), self.accelerator.autocast():
            return output_tensor(self.teacher(**arguments)), CallBatch(arguments)

    def preview(self, accelerator: Accelerator, average: AveragedWeights, log: RunLog, step: int) -> None:
        """The same prompts and seeds at each budget beside the original, and what each budget is away from it."""
        if not (accelerator.is_main_process or self.config.fsdp):  # a sharded network needs all processes
            return
        with average.in_place_of(self.network), self.prompts_on_disk(), accelerator.autocast():
            picture, table = self.validation.measure()
        if accelerator.is_main_process:
            folder = Path(self.config.out) / "samples"
            if picture is not None:
                save_image(picture, folder / f"step-{step:08d}.png")
                log.image(picture, step)
            write_text(folder / f"step-{step:08d}.json", json.dumps(table, indent=1) + "\n")
            self.last_table = table

    def finish(self, accelerator: Accelerator, average: AveragedWeights) -> dict[str, Any]:
        weights = average.whole()
        if accelerator.is_main_process:
            save_add_on(accelerator.unwrap_model(self.network), weights, Path(self.config.out))
        return {"out": self.config.out, "validation": getattr(self, "last_table", None)}


def prepare_student(network: Any, config: DistillConfig) -> None:
    """Puts interface and low-rank changes into a transformer, and says what of it is trained. Raises ValueError."""
    given = {name: getattr(config, name) for name in ("read_after", "write_after", "window")}
    elastify(
        network, mode=config.mode, seed=config.seed, **{n: value for n, value in given.items() if value is not None}
    )
    if config.weights == "lora":
        add_low_rank(network, config.lora_rank, seed=config.seed)
    for module in network.modules():  # the teacher drops nothing, and a resumed run repeats itself
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "dropout_prob"):  # DiT's labels
            module.dropout_prob = 0.0
    network.requires_grad_(config.weights == "all")
    network.elastic.requires_grad_()
    network.elastic_record = replace(
        network.elastic_record,
        lora_rank=config.lora_rank if config.weights == "lora" else 0,
        original_at_full=config.weights != "all",
        base=config.pipeline,
    )


def student_budgets(network: Any, config: DistillConfig) -> tuple[int, ...]:
    """What a step's budget is drawn from. Raises ValueError for full budget where the original runs there."""
    full = network.budgets[-1]
    most = full - network.elastic_record.original_at_full if config.budget_max is None else config.budget_max
    if network.elastic_record.original_at_full and most >= full:
        raise ValueError(f"budget_max={most}: at full budget the original runs; give at most {full - 1}")
    return training_budgets(network.budgets, config.budget_min, most)
