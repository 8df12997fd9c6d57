"""Settings of training runs: keyword-only frozen dataclasses, checked when made, written to and read from YAML."""

import json
import math
import re
from collections.abc import Hashable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import timedelta
from inspect import formatannotation
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from elit.files import write_text

T = TypeVar("T")
TRACKERS = ("tensorboard", "wandb", "trackio")
WAIT = timedelta(hours=12)  # For a process that works alone, on captions or previews; torch would give up in minutes.
DATA = ("digits", "moving-digits", "fashion-mnist", "idx:FOLDER")  # Data sets with a name; any other is a folder.
MAX_COUNT = 10_000_000  # Most steps, samples and the like of a command: more would fill the memory first.


def require(holds: bool, name: str, value: object, valid: str) -> None:
    """Raises ValueError, "`name` must be `valid`, got `value`", unless the condition holds."""
    if not holds:
        raise ValueError(f"{name} must be {valid}, got {value!r}")


def require_counts(settings: object, *names: str, least: int = 1, most: int = MAX_COUNT) -> None:
    """Checks the bounds of fields that are a number, a tuple of numbers, or None."""
    for name in names:
        value = getattr(settings, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None:
                require(number >= least, name, number, f"at least {least}")
                require(number <= most, name, number, f"at most {most}")


def check_data(name: str, option: str = "data") -> None:
    """Raises ValueError unless a data set has this name, or something lies there."""
    if name not in DATA and not name.startswith("idx:") and not Path(name).exists():
        raise ValueError(f"{option} must be a folder, a file or one of {', '.join(DATA)}, got {name!r}: no such file")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network to train; what is unset comes from the preset or from the data."""

    name: str = "ELIT-DiT-S/2"  # A preset: one of elit.list_models().
    sample_size: int | tuple[int, ...] | None = None  # Pixels or cells, (frames, rows, columns); default: the data's.
    in_channels: int | None = None  # Channels of a sample; default: the data's.
    num_classes: int | None = None  # Classes; default: the data's.
    patch_size: int | None = None  # Pixels of a token along each axis.
    hidden_size: int | None = None  # Width d.
    depth: int | None = None  # Number of transformer blocks.
    num_heads: int | None = None  # Attention heads.
    split: tuple[int, int, int] | None = None  # Blocks in head, core and tail (ELIT).
    window: tuple[int, ...] | None = None  # Tokens of a window along each axis (ELIT).
    num_latents: int | None = None  # J, latents of a window at full budget (ELIT); default: its number of tokens.
    text_encoder: str | None = None  # MM-DiT: "characters", built in, or a Hugging Face encoder by name or folder.
    text_features: int | None = None  # MM-DiT: width of the text embeddings; a Hugging Face encoder decides it.
    text_length: int | None = None  # MM-DiT: maximum number of tokens in a prompt (bytes, for characters).
    pooled_features: int | None = None  # MM-DiT: width of the pooled text, 0 for none; an encoder decides it.

    def arguments(self) -> dict[str, Any]:
        """The fields that are set, as arguments of `elit.create_model`."""
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings that all training runs share."""

    FIXED_ON_RESUME: ClassVar[tuple[str, ...]] = ("batch_size", "seed", "optimizer", "ema_more")  # Identify a run.

    out: str = "runs/train"  # Folder of the run: model/, config.yaml, metrics.jsonl, checkpoints/, samples/, logs/.
    workers: int = 0  # Processes that load data.

    steps: int = 10_000  # Optimizer steps.
    batch_size: int = 256  # Samples a step, over all processes and accumulated micro-batches.
    gradient_accumulation: int = 1  # Micro-batches a step; they share one budget.
    learning_rate: float = 1e-4  # Learning rate after warm-up.
    warmup_steps: int = 1_000  # Steps over which the learning rate rises from 0.
    schedule: Literal["constant", "cosine", "linear"] = "constant"  # From warm-up on; cosine and linear fall to 0.
    decay_share: float = 0.2  # Share of the steps, the last ones, over which a linear schedule falls.
    optimizer: Literal["adam", "adamw", "muon"] = "adam"  # muon: on the matrices of blocks, and adamw on all else.
    betas: tuple[float, float] = (0.9, 0.999)  # Decays of Adam's two moments.
    weight_decay: float = 0.01  # For adamw and muon; norms, biases, embeddings and latents do not decay.
    max_grad_norm: float = 1.0  # Gradients are clipped to this norm.
    ema_decay: float = 0.9999  # Decay of the averaged, saved weights; it warms up as (1 + step) / (10 + step).
    ema_more: tuple[float, ...] = ()  # Further decays, of one more average each, saved in model-ema-DECAY.
    budget_min: int | None = None  # J_min, fewest latents per window in training; default 1; budget_max for one budget.
    budget_max: int | None = None  # J_max, most latents per window drawn in training; default J.
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16 runs the network under autocast.
    gradient_checkpointing: bool = False  # Recompute block activations: less memory, a third more time.
    compile: bool = False  # torch.compile on the blocks: two graphs for all budgets.
    fsdp: bool = False  # Shard weights, average, gradients and moments over processes (FSDP2); default: copies (DDP).
    ema_on_cpu: bool = False  # Keep the averaged weights in the CPU's memory.
    seed: int = 0  # Seed of the weights, the data order, the noise, the times and the budgets.

    max_skipped: int = 10  # Steps that may be skipped because their gradient is not finite; one more stops the run.
    log_every: int = 50  # Steps between lines on the console, and between writes of metrics.jsonl and the trackers.
    trackers: tuple[str, ...] = ("tensorboard",)  # Beside metrics.jsonl: tensorboard, wandb, trackio.
    checkpoint_every: int = 1_000  # Steps between checkpoints.
    async_checkpoints: bool = False  # Write checkpoints in the background, from a copy in the CPU's memory.
    keep_last: int = 2  # Number of newest checkpoints kept.
    keep_every: int | None = None  # Checkpoints at multiples of this step are never deleted.
    preview_every: int = 1_000  # Steps between preview pictures from the averaged weights; 0 for none.
    resume: bool = False  # Resume from the newest checkpoint in `out`.

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        rate, start = self.learning_rate * min(1.0, (step + 1) / max(self.warmup_steps, 1)), self.warmup_steps
        if self.schedule == "linear":
            start = self.steps * (1 - self.decay_share)
        done = max(0, step - start) / max(1, self.steps - start)
        return rate * {"constant": 1, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.schedule]

    def __post_init__(self) -> None:
        most = (1 << 63) - 1  # a checkpoint that is never due may be 10¹² steps away
        counts = ("steps", "batch_size", "gradient_accumulation", "log_every", "checkpoint_every", "keep_last")
        require_counts(self, *counts, "keep_every", most=most)
        require_counts(self, "warmup_steps", "preview_every", "workers", "max_skipped", "seed", least=0, most=most)
        for name in ("learning_rate", "max_grad_norm"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name, values in (("ema_decay", (self.ema_decay,)), ("ema_more", self.ema_more), ("betas", self.betas)):
            for value in values:
                require(0 <= value < 1, name, value, "in [0, 1)")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
        require(0 < self.decay_share <= 1, "decay_share", self.decay_share, "above 0 and at most 1")
        for tracker in self.trackers:
            require(tracker in TRACKERS, "trackers", tracker, f"any of {', '.join(TRACKERS)}")
        multiple = f"a multiple of gradient_accumulation={self.gradient_accumulation}"
        require(self.batch_size % self.gradient_accumulation == 0, "batch_size", self.batch_size, multiple)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """One training run; the defaults are the paper's recipe (section 3) with the batch and length of a small run."""

    FIXED_ON_RESUME = ("model", "data", "image_size", "skip_unreadable", "validation_share", *RunConfig.FIXED_ON_RESUME)

    model: ModelConfig = field(default_factory=ModelConfig)  # The network.
    data: str = "digits"
    """"digits" (scikit-learn's, built in), "moving-digits" (clips of them), "fashion-mnist" (Debian's package or the
    Hub), "idx:FOLDER" (other IDX files), a folder that `elit encode` wrote, or a folder of images, one sub-folder a
    class or all in one; for MM-DiT with a metadata.jsonl of captions, or else the folders' names are prompts."""
    image_size: int = 64  # Images of a folder are resized and centre-cropped to this.
    skip_unreadable: bool = False  # Skip unreadable images of a folder instead of stopping at the first.
    horizontal_flip: bool = False  # Mirror every second sample, drawn anew each time; not of encoded latents.
    class_dropout: float = 0.1  # Share of labels or prompts dropped, for classifier-free guidance.
    time_shift: float = 1.0  # Shift of the training times towards noise; 1 is the paper's logit-normal(0, 1).
    init: str | None = None  # Start from the weights of this saved model; missing ones start anew.
    score_every: int = 0  # Steps between scores of the averaged weights, at the full budget and a quarter; 0 for none.
    score_samples: int = 1_000  # Samples behind a score, always from the same seeds; 0 for the validation loss alone.
    validation_share: float = 0.0  # Share of the data held out, evenly spaced; each score has its loss.
    score_detector: str | None = None  # As elit evaluate --detector, with its default for the data.
    score_reference: str | None = None  # As elit evaluate --reference; default: the data.

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "image_size")
        require_counts(self, "score_every", "score_samples", least=0)
        share, samples = self.validation_share, self.score_samples
        require(0 <= share <= 0.5, "validation_share", share, "from 0 to 0.5")
        require(not share or self.score_every > 0, "score_every", self.score_every, "above 0 with validation_share")
        require(samples > 1 or (samples == 0 and share > 0), "score_samples", samples, "at least 2")
        require(self.time_shift > 0, "time_shift", self.time_shift, "above 0")
        require(0 <= self.class_dropout < 1, "class_dropout", self.class_dropout, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class DistillConfig(RunConfig):
    """One distillation: a pretrained diffusers pipeline's transformer learns to work at every budget."""

    FIXED_ON_RESUME = (
        *("pipeline", "prompts", "data", "sizes", "call", "trajectories", "teacher_steps", "teacher_batch"),
        *("read_after", "write_after", "window", "mode", "weights", "lora_rank", "base_precision", "prompt_dropout"),
        *RunConfig.FIXED_ON_RESUME,
    )

    out: str = "runs/distill"  # Folder for elastic.json, elastic.safetensors, their card, and the run's files.
    pipeline: str = ""  # A diffusers pipeline, folder or hub name; or the folder of a DiT of this library.
    variant: str | None = None  # Variant of the pipeline's weights, such as fp16.
    revision: str | None = None  # Revision of the pipeline on the hub.
    init: str | None = None  # Train on from this add-on, folder or hub name, with its place and rank.
    prompts: str | None = None  # A text file with a prompt (or class) a line, which the original samples and records.
    data: str | None = None  # Captioned pictures instead: a folder, .parquet or .tar; for an own DiT its data.
    sizes: tuple[str, ...] = ()  # HEIGHTxWIDTH each (1024x1024 1664x928), or a square's side; default: the pipeline's.
    call: tuple[str, ...] = ()  # Arguments of the pipeline's call, NAME=VALUE, such as true_cfg_scale=4.0.
    trajectories: int | None = None  # Pictures that the original samples, over all prompts; default: one a prompt.
    teacher_steps: int = 20  # num_inference_steps of each; every second batch takes three quarters as many.
    teacher_batch: int = 8  # Prompts that the pipeline runs at a time while trajectories are recorded.
    read_after: int | None = None  # Blocks before Read; default: the paper's proportion for this class.
    write_after: int | None = None  # Blocks before Write; default: the paper's proportion for this class.
    window: tuple[int, ...] | None = None  # Tokens of a window along each axis; default: fits the class's grids.
    mode: Literal["carry", "learned"] = "carry"  # Latents start as the window's tokens (carry) or the paper's own.
    weights: Literal["lora", "interface", "all"] = "lora"  # Trained: Read and Write, low-rank changes too, or all.
    lora_rank: int = 16  # Rank of the low-rank changes.
    base_precision: Literal["fp32", "bf16"] | None = None  # The pipeline's weights; default: --precision; all: fp32.
    distillation: float = 20.0  # With data: weight of the distance to the original beside the class's own loss.
    prompt_dropout: float = 0.1  # With data: share of prompts or labels dropped, for the unconditional branch.
    time_shift: float = 1.0  # With data: shift of the training times towards noise; 1 is logit-normal(0, 1).
    steps: int = 2_000  # Optimizer steps.
    batch_size: int = 32  # Samples a step, over all processes and accumulated micro-batches.
    warmup_steps: int = 50  # Steps over which the learning rate rises from 0.
    schedule: Literal["constant", "cosine", "linear"] = "linear"  # From warm-up on; cosine and linear fall to 0.
    decay_share: float = 1.0  # Share of the steps, the last ones, over which a linear schedule falls.
    ema_decay: float = 0.99  # Decay of the averaged, saved weights; it warms up as (1 + step) / (10 + step).
    preview_every: int = 500  # Steps between validation pictures; 0 for none.
    preview_prompts: int = 4  # Number of validation pictures, of the first prompts of the file.

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "teacher_steps", "teacher_batch", "lora_rank", "preview_prompts")
        for name in ("distillation", "time_shift"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        require(0 <= self.prompt_dropout < 1, "prompt_dropout", self.prompt_dropout, "in [0, 1)")
        if self.prompts and self.data:
            raise ValueError("cannot learn from prompts and data at once: give one of them")
        for size in self.sizes:
            whole = re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", size)
            require(bool(whole), "sizes", size, "HEIGHTxWIDTH in pixels, such as 1024x1024")
        for argument in self.call:
            require(bool(re.match(r"[^\W\d]\w*=", argument)), "call", argument, "of the form NAME=VALUE")


def save_config(config: RunConfig, path: Path) -> None:
    """Writes YAML that `load_config` reads back equal."""
    plain = json.loads(json.dumps(asdict(config)))  # tuples become lists
    write_text(path, yaml.safe_dump(plain, sort_keys=False))


def recipes() -> dict[str, Path]:
    """The recipes in the package, by name: "imagenet-256/elit-dit-xl" and its file."""
    folder = Path(__file__).parent / "recipes"
    return {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.glob("*/*.yaml"))}


class UniqueLoader(yaml.SafeLoader):
    """Refuses a field that is there twice; PyYAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise yaml.YAMLError(f"{twice[0]!r} is there twice")
        return super().construct_mapping(node, deep)


def load_config(path: str | Path, kind: type[T] = TrainConfig) -> T:
    """Reads YAML with any of `kind`'s fields; "recipe:NAME" is a file in the package."""
    file = Path(path)
    if str(path).startswith("recipe:"):
        known, name = recipes(), str(path).removeprefix("recipe:")
        require(name in known, "config", str(path), "a recipe that elit recipes lists")
        file = known[name]
    if not file.is_file():
        raise ValueError(f"config={str(path)!r}: no such file")
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), UniqueLoader) or {}
    except (yaml.YAMLError, ValueError) as error:  # the latter of bytes that are no text, or dates that do not exist
        raise ValueError(f"config={str(path)!r}: not YAML: {' '.join(str(error).split())}") from None
    return _build(kind, content, str(path))


def _build(kind: Any, content: object, where: str) -> Any:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: must be `field: value` lines, got {type(content).__name__}")
    hints, names = get_type_hints(kind), [each.name for each in fields(kind)]
    if unknown := [name for name in content if name not in names]:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; valid ones: {', '.join(names)}")
    return kind(**{name: _value(hints[name], value, f"{where}: {name}") for name, value in content.items()})


def _value(hint: Any, value: Any, where: str) -> object:
    """The value as its field's type; YAML has no tuples, and reads 1e-4 as text. Raises ValueError."""
    if is_dataclass(hint):
        return _build(hint, value, where)
    for kind in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        if get_origin(kind) is tuple:
            if isinstance(value, list) and all(type(each) is get_args(kind)[0] for each in value):
                return tuple(value)
        elif kind is float and type(value) in (int, float, str):
            with suppress(ValueError, OverflowError):
                return float(value)
        elif value in get_args(kind) if get_origin(kind) is Literal else type(value) is kind:
            return value
    raise ValueError(f"{where} must be {formatannotation(hint)}, got {value!r}")
