"""Distillation: an elastified transformer learns to be, at every budget, what its original is at all tokens.

The original is the same weights without interface and low-rank changes, inside `original()`, and was recorded while the
pipeline itself ran; so no second copy of it is needed, even where all weights are trained.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from elit.budgets import training_budgets
from elit.config import DistillConfig
from elit.data.images import save_image
from elit.data.sampler import BucketSampler
from elit.elastic.add_on import save_add_on
from elit.elastic.call_files import RecordedCalls, save_calls
from elit.elastic.context import budget
from elit.elastic.families import all_blocks, family_of
from elit.elastic.low_rank import add_low_rank
from elit.elastic.pipelines import Requests, check_pipeline, load_pipeline, read_prompts
from elit.elastic.recording import arguments_by_row, encoded_prompts, first_call, free_text_encoders, output_tensor
from elit.elastic.recording import record as record_calls
from elit.elastic.surgery import elastify
from elit.elastic.validation import Validation
from elit.files import write_text
from elit.training.ema import AveragedWeights
from elit.training.logger import RunLog
from elit.training.loop import train_task
from elit.training.objectives import Draws
from elit.training.task import Task


def distill(config: DistillConfig) -> dict[str, Any]:
    """Trains what `config` says; returns what validation measured last. Resumes, stops and raises as `train_task`."""
    return train_task(config, lambda accelerator: DistillPipeline(config, accelerator))


@dataclass(frozen=True, kw_only=True)
class DistanceToTeacher:
    """‖v − v_teacher‖² on calls that were recorded of the original, whatever v is to its class."""

    noise: Callable[[Mapping[str, Any]], Tensor]
    """A call's noise level, 1 = noise."""
    autocast: Callable[[], AbstractContextManager[Any]]

    def draw(self, step: int) -> Draws:
        return ()

    def losses(self, model: nn.Module, batch: Any, draws: Draws, budget_: int | None) -> tuple[Tensor, Tensor]:
        teacher, call = batch
        with budget(budget_, doubled=False), self.autocast():
            output = output_tensor(model(**call.nested()))
        t = (1 - self.noise(call.arguments).float()).expand(len(teacher)).clamp(0, 1)
        return t, (output.float() - teacher.float()).square().flatten(1).mean(1)


class DistillPipeline(Task):
    """The transformer of a diffusers pipeline, on trajectories that the pipeline draws itself."""

    sampler: BucketSampler

    def __init__(self, config: DistillConfig, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        check_pipeline(config.pipeline)
        prompts = read_prompts(config.prompts)
        self.pipe = load_pipeline(config, accelerator.device)
        self.requests = Requests(self.pipe, config, prompts)
        self.network = network = self.pipe.transformer
        self.family, self.blocks = family_of(network), all_blocks(network)
        set_seed(config.seed)
        prepare_student(network, config)
        network.elastic.float()  # whatever the precision of the rest
        self.budgets = student_budgets(network, config)

    @property
    def cache(self) -> Path:
        """Named by what is recorded in it, so that other settings are another folder."""
        config = self.config
        names = (
            "pipeline",
            "sizes",
            "call",
            "trajectories",
            "teacher_steps",
            "teacher_batch",
            "seed",
            "preview_prompts",
        )
        settings = [getattr(config, name) for name in names]
        settings += [self.requests.prompts, str(self.network.dtype)]
        return Path(config.out) / "cache" / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]

    def initialize(self, *, resumed: bool) -> list[str]:
        """Records the original, whatever is not there yet; the processes share the work."""
        accelerator, config, requests = self.accelerator, self.config, self.requests
        rank, world = accelerator.process_index, accelerator.num_processes
        if accelerator.is_main_process:
            for other in self.cache.parent.glob("*"):
                if other != self.cache:
                    shutil.rmtree(other, ignore_errors=True)
        with self.prompts_on_disk():
            self.record(rank, world)
        accelerator.wait_for_everyone()
        self.examples = RecordedCalls(self.cache / "calls")
        self.sampler = BucketSampler(
            self.examples.buckets,
            seed=config.seed,
            batch_size=config.batch_size,
            parts=config.gradient_accumulation,
            rank=rank,
            world=world,
            stop=config.steps,
        )
        self.validation = Validation(self.pipe, requests, self.examples)
        self.flops = self.validation.flops(3 if config.weights == "all" else 2)
        trained = sum(weight.numel() for weight in self.network.parameters() if weight.requires_grad)
        sizes = len(self.examples.buckets)
        return [f"{len(self.examples):,} recorded calls in {sizes} buckets; {trained:,} weights to train"]

    def prompts_on_disk(self) -> AbstractContextManager[None]:
        if not hasattr(self.pipe, "encode_prompt"):  # a pipeline of classes
            return nullcontext()
        return encoded_prompts(self.pipe, self.cache / "prompts")

    def record(self, rank: int, world: int) -> None:
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

    def arguments_by_row(self) -> frozenset[str]:
        """Which of the transformer's arguments have an entry a sample."""
        one = two = first_call(self.pipe, self.requests.request(self.requests.prompts[:1], number=0, steps=1))
        if self.config.teacher_batch > 1:  # else the pipeline may be one that takes a prompt at a time, Wan VACE's
            two = first_call(self.pipe, self.requests.request(self.requests.prompts[:1] * 2, number=0, steps=1))
        return arguments_by_row(one, two, self.family.sample)

    def objective(self, accelerator: Accelerator) -> DistanceToTeacher:
        return DistanceToTeacher(noise=self.family.noise, autocast=accelerator.autocast)

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
