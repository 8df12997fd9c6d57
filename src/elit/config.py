"""Settings of a training run: keyword-only frozen dataclasses, checked when made, written to and read from YAML."""

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from elit.files import write_text

TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network to train; what is left unset comes from the preset or from the data."""

    name: str = "ELIT-DiT-S/2"
    """A preset: one of elit.list_models()."""
    sample_size: int | tuple[int, ...] | None = None
    """Pixels (or autoencoder cells) along each axis, (frames, rows, columns) for video; default: the data's."""
    in_channels: int | None = None
    """Channels of a sample; default: the data's."""
    num_classes: int | None = None
    """Classes; default: the data's."""
    patch_size: int | None = None
    """Pixels of a token along each axis."""
    hidden_size: int | None = None
    """Width d."""
    depth: int | None = None
    """Transformer blocks in all."""
    num_heads: int | None = None
    """Attention heads."""
    split: tuple[int, int, int] | None = None
    """Blocks in head, core and tail (ELIT)."""
    window: tuple[int, ...] | None = None
    """Tokens of a group along each axis (ELIT)."""
    num_latents: int | None = None
    """J, latents of a group at full budget (ELIT); default: as many as tokens in the window."""
    text_encoder: str | None = None
    """MM-DiT: "characters", built in and trained along, or a Hugging Face encoder by name or folder."""
    text_features: int | None = None
    """MM-DiT: width of the text embeddings; a Hugging Face encoder decides it."""
    text_length: int | None = None
    """MM-DiT: tokens of a prompt at most (bytes, for characters)."""
    pooled_features: int | None = None
    """MM-DiT: width of the pooled text in the conditioning, 0 for none; a Hugging Face encoder decides it."""

    def chosen(self) -> dict[str, Any]:
        """The fields that are set, as arguments of `elit.create_model`."""
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run; the defaults are the paper's recipe (section 3) with the batch and length of a small run."""

    out: str = "runs/train"
    """Folder of the run: model/, config.yaml, metrics.jsonl, checkpoints/, samples/, logs/."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Which network."""
    data: str = "digits"
    """"digits" (scikit-learn's, built in), "moving-digits" (clips of them), "fashion-mnist" (its IDX files as Debian's
    dataset-fashion-mnist has them, or the Hub), "idx:FOLDER" (other IDX files), a folder that `elit encode` wrote, or a
    folder of images with one sub-folder a class; for MM-DiT with a metadata.jsonl of captions, or else the sub-folders'
    names are the prompts."""
    image_size: int = 64
    """Images of a folder are resized and centre-cropped to this."""
    skip_unreadable: bool = False
    """Leave unreadable images of a folder out instead of stopping at the first."""
    workers: int = 0
    """Processes that load data."""

    steps: int = 10_000
    """Optimizer steps in all."""
    batch_size: int = 256
    """Images a step, over all processes and accumulated micro-batches."""
    gradient_accumulation: int = 1
    """Micro-batches a step; they share one budget."""
    learning_rate: float = 1e-4
    """Adam's learning rate after warm-up."""
    warmup_steps: int = 1_000
    """Steps over which the learning rate rises from 0."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    ema_decay: float = 0.9999
    """Decay of the averaged weights, which are the ones saved; it warms up as (1 + step) / (10 + step)."""
    class_dropout: float = 0.1
    """Share of labels or prompts left out, for classifier-free guidance."""
    time_shift: float = 1.0
    """Shift of the training times towards noise; 1 is the paper's logit-normal(0, 1)."""
    budget_min: int | None = None
    """J_min, fewest latents per group drawn in training; default 1. Set it to budget_max for a single budget."""
    budget_max: int | None = None
    """J_max, most latents per group drawn in training; default J."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the network under autocast."""
    gradient_checkpointing: bool = False
    """Recompute block activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile on the blocks: two graphs for all budgets."""
    fsdp: bool = False
    """Shard weights, their average, gradients and moments over the processes (FSDP2) instead of copying them (DDP)."""
    ema_on_cpu: bool = False
    """Keep the averaged weights in the CPU's memory; the copies travel beside the next step."""
    seed: int = 0
    """Seed of the weights, the data order, the noise, the times and the budgets."""

    max_skipped: int = 10
    """Steps that may be left out because their gradient is not finite; one more stops the run."""
    log_every: int = 50
    """Steps between lines on the console, and between writes of metrics.jsonl and the trackers."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Where figures go besides metrics.jsonl: tensorboard, wandb, trackio."""
    checkpoint_every: int = 1_000
    """Steps between checkpoints."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_every: int | None = None
    """Checkpoints at multiples of this step are kept for good."""
    preview_every: int = 1_000
    """Steps between preview grids from the averaged weights; 0 for none."""
    init: str | None = None
    """Start from the weights of this saved model; what it lacks starts anew (a baseline's weights into ELIT)."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation", "log_every", "image_size"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "give at least 1")
        for name in ("checkpoint_every", "keep_last"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "give at least 1")
        _require(self.keep_every is None or self.keep_every >= 1, "keep_every", self.keep_every, "give at least 1")
        for name in ("warmup_steps", "preview_every", "workers", "seed", "max_skipped"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "give 0 or more")
        for name in ("learning_rate", "max_grad_norm", "time_shift"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "give a number above 0")
        for name in ("ema_decay", "class_dropout"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "give a number in [0, 1)")
        _require(self.precision in ("fp32", "bf16"), "precision", self.precision, "give fp32 or bf16")
        for tracker in self.trackers:
            _require(tracker in TRACKERS, "trackers", tracker, f"give any of {', '.join(TRACKERS)}")
        parts = self.gradient_accumulation
        _require(self.batch_size % parts == 0, "batch_size", self.batch_size, f"give a multiple of {parts}, the parts")


def _require(holds: bool, name: str, value: Any, valid: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r}: {valid}")


def save_config(config: TrainConfig, path: Path) -> None:
    """Writes YAML that `load_config` reads back equal."""
    plain = asdict(config)
    for part in (plain, plain["model"]):
        part.update({key: list(value) for key, value in part.items() if isinstance(value, tuple)})
    write_text(path, yaml.safe_dump(plain, sort_keys=False))


def load_config(path: str | Path) -> TrainConfig:
    """Reads YAML with any of TrainConfig's fields. Raises ValueError naming an unknown field or a bad value."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"config={str(path)!r}: no such file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"config={str(path)!r}: not YAML: {' '.join(str(error).split())}") from None
    return _build(TrainConfig, content, str(path))


def _build(kind: type, content: Any, where: str) -> Any:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: expected `field: value` lines, found {type(content).__name__}")
    hints = get_type_hints(kind)
    if unknown := sorted(set(map(str, content)) - set(hints)):
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; valid ones: {', '.join(hints)}")
    values = {}
    for name, value in content.items():
        if dataclasses.is_dataclass(hints[name]):
            value = _build(hints[name], value, f"{where}: {name}")
        else:
            value = _checked(hints[name], value, f"{where}: {name}")
        values[name] = value
    return kind(**values)


def _checked(hint: Any, value: Any, where: str) -> Any:
    """The value as its field's type; YAML knows no tuples, and reads 1e-4 as text. Raises ValueError."""
    value = tuple(value) if isinstance(value, list) else value
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    for kind in kinds:
        if get_origin(kind) is Literal:
            return value  # TrainConfig says which are valid
        if get_origin(kind) is tuple:
            if isinstance(value, tuple) and all(type(part) is get_args(kind)[0] for part in value):
                return value
        elif type(value) is kind:
            return value
        elif kind is float and isinstance(value, int | str) and not isinstance(value, bool):
            with suppress(ValueError):
                return float(value)
    names = " or ".join("a number" if kind is float else getattr(kind, "__name__", str(kind)) for kind in kinds)
    raise ValueError(f"{where}={value!r}: expected {names}".replace("NoneType", "null"))
