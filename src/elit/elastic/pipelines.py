"""A diffusers pipeline as distillation uses it: loaded, called for prompts, its transformer's calls recorded."""

import ast
import hashlib
import inspect
import pickle
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor, nn

from elit.compat import execution_device, tree_map, tree_map_only
from elit.config import DistillConfig
from elit.elastic.context import current_branch, original
from elit.elastic.families import family_of
from elit.elastic.families.family import Arguments, Model, Pipeline, Tree
from elit.files import read_lines, replacing
from elit.models.saved import check_hub_name, quiet_loading
from elit.sampling.autoencoders import downsampling

Size = tuple[int, int]  # (height, width) in pixels
OURS = ("prompt", "class_labels", "height", "width", "num_inference_steps", "generator", "output_type", "return_dict")
"""Arguments of a pipeline's call that distillation sets itself."""
TIMES = ("timestep", "t")  # names of the argument that holds the time


def one_line(error: Exception) -> str:
    """The message of another library's error, for a line of ours."""
    return " ".join(str(error).split())[:200]


def load_pipeline(config: DistillConfig, device: torch.device) -> Pipeline:
    """The pipeline on `device`. Raises ValueError where there is none, or no single transformer to train."""
    name = config.pipeline
    check_hub_name("pipeline", name)
    precision = config.base_precision or ("fp32" if config.weights == "all" else config.precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    options = {"variant": config.variant, "revision": config.revision}
    try:
        with quiet_loading():
            pipe = diffusers.DiffusionPipeline.from_pretrained(name, torch_dtype=dtype, **options)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise ValueError(f"cannot load pipeline {name!r}: {one_line(error)}; give a folder or a hub name") from None
    check_transformer(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def check_transformer(pipe: Pipeline) -> None:
    """Raises ValueError for a pipeline without a transformer of a known class, and with two of them."""
    kind, transformer = type(pipe).__name__, getattr(pipe, "transformer", None)
    if not isinstance(transformer, nn.Module):
        has = ", ".join(part for part, value in pipe.components.items() if isinstance(value, nn.Module))
        raise ValueError(f"pipeline must have a transformer, got a {kind} with {has}")
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError(f"pipeline must have one transformer, got a {kind} with two; not supported for those yet")
    family_of(transformer)


def read_prompts(path: str | None) -> list[str]:
    """The lines of a prompt file, empty ones left out. Raises ValueError."""
    if path is None:
        raise ValueError("prompts must be a text file with a prompt a line, unless pictures are given as data")
    try:
        lines = read_lines(Path(path))
    except OSError as error:
        raise ValueError(f"cannot read prompts {path!r}: {error.strerror}; give a file with a prompt a line") from None
    if not (prompts := [line.strip() for line in lines]):
        raise ValueError(f"prompts must have a prompt a line, got the empty file {path!r}")
    return prompts


def takes_classes(pipe: Pipeline) -> bool:
    return "class_labels" in inspect.signature(pipe.__call__).parameters


def cell_of(pipe: Pipeline) -> int:
    """Pixels of an autoencoder's cell along an axis."""
    return int(getattr(pipe, "vae_scale_factor", 0) or downsampling(pipe.vae))


def default_size(pipe: Pipeline) -> Size:
    """(height, width) of a call that names none: a square."""
    cells = getattr(pipe, "default_sample_size", None) or pipe.transformer.config.get("sample_size") or 128
    return cells * cell_of(pipe), cells * cell_of(pipe)


class Requests:
    """The calls of a pipeline, batch after batch: a function of the settings alone."""

    def __init__(self, pipe: Pipeline, config: DistillConfig, prompts: list[str]):
        self.config, self.by_class = config, takes_classes(pipe)
        kind, known = type(pipe).__name__, inspect.signature(pipe.__call__).parameters
        self.call: Arguments = {}
        for each in config.call:
            name, _, value = each.partition("=")
            if name not in known or name in OURS:
                valid = ", ".join(name for name in known if name not in OURS)
                raise ValueError(f"call must name arguments of {kind} ({valid}), got {each!r}")
            try:
                self.call[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                self.call[name] = value
        if "use_kv_cache" in known:  # Qwen-Image 2.1: what a step has left for the next is no argument of a call
            self.call.setdefault("use_kv_cache", False)
        self.sized = "height" in known
        if config.sizes and not self.sized:
            raise ValueError(f"sizes must be left out for a {kind}, which has one size")
        pairs = [each.partition("x") for each in config.sizes]
        self.sizes: list[Size | None] = [(int(height), int(width or height)) for height, _, width in pairs] or [None]
        self.prompts: list[str | int] = list(prompts)
        self.nothing: str | int = self.call.get("negative_prompt") or ""
        self.guided = "negative_prompt" in self.call
        if self.by_class:
            labels = getattr(pipe, "labels", {})
            for name in prompts:
                if not name.isdigit() and name not in labels:
                    raise ValueError(f"prompts must be labels of this pipeline's classes, or numbers, got {name!r}")
            self.prompts = [int(name) if name.isdigit() else labels[name] for name in prompts]
            self.nothing = pipe.transformer.config.num_embeds_ada_norm

    def batches(self) -> Iterator[Arguments]:
        """The trajectories to record, `teacher_batch` of one size at a time."""
        config, size, count = self.config, self.config.teacher_batch, len(self.prompts)
        numbers = (config.teacher_steps, max(1, config.teacher_steps * 3 // 4))
        ways = [(steps, pixels) for steps in numbers for pixels in self.sizes]
        total = count if config.trajectories is None else config.trajectories
        for number, first in enumerate(range(0, total, size)):
            rows = range(first, min(first + size, total))
            repeat, place = divmod(first, count)  # another way for a prompt each time that it comes
            steps, pixels = ways[(place // size + repeat) % len(ways)]
            prompts = [self.prompts[row % count] for row in rows]
            yield self.request(prompts, number=number, steps=steps, size=pixels)

    def validation(self, count: int | None = None, **changes: str) -> Arguments:
        """The first prompts, at the first size, always from the same noise, which no trajectory starts from."""
        rows = range(count or self.config.preview_prompts)
        prompts = [self.prompts[row % len(self.prompts)] for row in rows]
        return self.request(prompts, number=-1, steps=self.config.teacher_steps) | changes

    def request(
        self, prompts: list[str | int], *, number: int = 0, steps: int = 1, size: Size | None = None
    ) -> Arguments:
        """One call of the pipeline; number: decides the seed. size: by default the first of the settings."""
        request: Arguments = {"class_labels" if self.by_class else "prompt": prompts, **self.call}
        request["num_inference_steps"] = steps
        if len(prompts) == 1 and not self.by_class:  # Wan VACE takes no lists
            request["prompt"] = prompts[0]
        elif isinstance(negative := request.get("negative_prompt"), str):
            request["negative_prompt"] = [negative] * len(prompts)
        size = size or self.sizes[0]
        if size is not None and self.sized:
            request |= {"height": size[0], "width": size[1]}
        request["output_type"] = "pt" if self.by_class else "latent"
        seed = self.config.seed * 1_000_003 + number
        return request | {"generator": torch.Generator().manual_seed(seed)}


class Stopped(Exception):
    """A pipeline's call has come as far as it was to go."""


def first_call(pipe: Pipeline, request: Arguments) -> Arguments:
    """The arguments of the transformer's first forward when `pipe` is called with `request`; it does not run."""
    return record(pipe, request, run=False)[0][1]


def record(pipe: Pipeline, request: Arguments, *, run: bool = True) -> list[tuple[str, Arguments, Tensor]]:
    """Runs `pipe` as the original; (branch of guidance, arguments, output) of each forward of its transformer."""
    calls: list[tuple[str, Arguments, Tensor]] = []

    def keep(module: Model, args: Tree, kwargs: Tree, output: Tree = ()) -> None:
        arguments = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
        for name in TIMES:
            if isinstance(time := arguments.get(name), Tensor) and time.numel() == 1:
                arguments[name] = time.reshape(-1).expand(len(arguments[family_of(module).sample]))
        calls.append((current_branch.get() or "all", arguments, output_tensor(output) if run else torch.empty(0)))
        if not run:
            raise Stopped

    register = pipe.transformer.register_forward_hook if run else pipe.transformer.register_forward_pre_hook
    handle = register(keep, with_kwargs=True)
    try:
        with torch.no_grad(), original(), suppress(Stopped):
            pipe(**request)
    finally:
        handle.remove()
    return calls


def output_tensor(output: Tree) -> Tensor:
    """The prediction in what a transformer's forward returns; a list with one tensor a sample as one tensor."""
    first = output if isinstance(output, Tensor) else output[0]
    return torch.stack(first) if isinstance(first, list) else first


@contextmanager
def encoded_prompts(pipe: Pipeline, folder: Path) -> Iterator[None]:
    """Lets `pipe.encode_prompt` encode each prompt once inside the block, and read it from `folder` afterwards."""
    encode: Callable[..., Tree] | None = getattr(pipe, "encode_prompt", None)
    if encode is None:  # a pipeline of classes
        yield
        return

    def cached(*args: Tree, **kwargs: Tree) -> Tree:
        given = inspect.signature(encode).bind(*args, **kwargs).arguments
        plain = {name: value for name, value in given.items() if not isinstance(value, torch.device)}
        if any(isinstance(value, Tensor) for value in plain.values()):
            return encode(*args, **kwargs)
        path = folder / f"{hashlib.sha256(repr(sorted(plain.items())).encode()).hexdigest()[:24]}.pt"
        if not path.is_file():
            write_tree(encode(*args, **kwargs), path)
        device = execution_device(pipe)
        return tree_map_only(Tensor, lambda value: value.to(device, copy=True), read_tree(path))

    pipe.encode_prompt = cached
    try:
        yield
    finally:
        pipe.encode_prompt = encode


def free_text_encoders(pipe: Pipeline) -> None:
    """Lets the text encoders go; what `encoded_prompts` has on disk stands in for them."""
    for name in list(pipe.components):
        if name.startswith("text_encoder"):
            setattr(pipe, name, None)


def layout_of(one: Tree, two: Tree, rows: tuple[int, int]) -> Tree:
    """A tree that is True where a call has one row a sample, told from calls with rows[0] and rows[1] samples."""
    if isinstance(one, Mapping):
        return {name: layout_of(each, two[name], rows) for name, each in one.items()}
    sized = one.ndim > 0 if isinstance(one, Tensor) else isinstance(one, list | tuple)
    if one is None:  # such as the mask of texts without padding; others have one, a row a sample
        return True
    if sized and (len(one), len(two)) == rows:
        return True
    if isinstance(one, list | tuple):
        return type(one)(layout_of(*pair, rows) for pair in zip(one, two, strict=True))
    return False


def take_rows(layout: Tree, tree: Tree, rows: slice) -> Tree:
    return tree_map(lambda by_row, value: value if value is None or not by_row else value[rows], layout, tree)


def join_rows(layout: Tree, trees: list[Tree]) -> Tree:
    """One tree of all rows; what has none is the first one's."""

    def join(by_row: bool, *values: Any) -> Any:
        if not by_row or values[0] is None:
            return values[0]
        return torch.cat(values) if isinstance(values[0], Tensor) else [row for value in values for row in value]

    return tree_map(join, layout, *trees)


def write_tree(tree: Tree, path: Path) -> None:
    """Writes a file whole or not at all; a tensor that occurs twice is in it once. Raises OSError without room."""
    with replacing(path) as temporary:
        try:
            torch.save(tree, temporary)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise OSError(f"cannot write {str(path)!r}: {reason}; make room, or give another folder") from None


@lru_cache(maxsize=1024)
def read_tree(path: Path) -> Tree:
    """A tree on the CPU, mapped into memory. Raises ValueError where the file is damaged."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error) or "it ends too early").splitlines()[0]
        raise ValueError(f"cannot read {str(path)!r}: damaged ({reason}); remove it and run again") from None


def save_calls(path: Path, calls: Sequence[tuple[str, Arguments, Tensor]], layout: Tree) -> None:
    """Writes (branch, arguments, output) of each call, and once what does not change from call to call."""

    def unchanged(value: Tree, before: Tree) -> Tree:
        tensors = isinstance(value, Tensor) and isinstance(before, Tensor) and value.dtype == before.dtype
        return before if tensors and torch.equal(value, before) else value

    before: dict[str, Arguments] = {}
    stored, kinds = [], []
    for branch, arguments, output in sorted(calls, key=lambda call: call[0]):
        plain = tree_map_only(Tensor, lambda value: value.detach().cpu().clone(), arguments)
        before[branch] = plain = tree_map(unchanged, plain, before.get(branch, plain))
        stored.append((plain, output.detach().cpu().clone()))
        kinds.append(_kinds_of(layout, plain, len(output)))
    write_tree({"layout": layout, "calls": stored, "kinds": kinds}, path)


def _kinds_of(layout: Tree, arguments: Arguments, rows: int) -> list[str]:
    """The kind of each row: a digest of all that it shares, and of the shapes of what is its own."""

    def shape(value: Tree) -> str:
        return f"{value.dtype}{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)

    def content(value: Tensor) -> str:
        data = value.reshape(-1).contiguous().view(torch.uint8).numpy()
        return f"{shape(value)}{hashlib.sha256(data.tobytes()).hexdigest()}"

    kinds = []
    shared = tree_map(lambda mine, each: None if mine else tree_map_only(Tensor, content, each), layout, arguments)
    for row in range(rows):
        one = take_rows(layout, arguments, slice(row, row + 1))
        own = tree_map(lambda mine, each: tree_map(shape, each) if mine else None, layout, one)
        kinds.append(hashlib.sha256(repr((shared, own)).encode()).hexdigest()[:16])
    return kinds


@dataclass
class CallBatch:
    """The arguments of a forward for a batch."""

    arguments: Arguments

    def to(self, device: torch.device, non_blocking: bool = False) -> "CallBatch":
        return CallBatch(tree_map_only(Tensor, lambda each: each.to(device, non_blocking=non_blocking), self.arguments))


class RecordedCalls:
    """The calls in some files, one entry a call and sample. Raises ValueError where there are none."""

    def __init__(self, folder: Path):
        self.paths = sorted(folder.glob("*.pt"))
        entries, self.kinds = [], []
        for number, path in enumerate(self.paths):
            for call, rows in enumerate(read_tree(path)["kinds"]):
                entries += [(number, call, row) for row in range(len(rows))]
                self.kinds += rows
        if not entries:
            raise ValueError(f"cannot read {str(folder)!r}: no recorded calls; run the command again")
        self.entries = np.array(entries)
        self.buckets = buckets_of(self.kinds)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, CallBatch]:
        """Outputs (B, ...) and the calls' arguments; indices: of one bucket."""
        outputs, trees = [], []
        for file, call, row in self.entries[list(indices)].tolist():
            content = read_tree(self.paths[file])
            arguments, output = content["calls"][call]
            trees.append(take_rows(content["layout"], arguments, slice(row, row + 1)))
            outputs.append(output[row : row + 1])
        return torch.cat(outputs), CallBatch(join_rows(content["layout"], trees))


def buckets_of(kinds: Sequence[Hashable]) -> list[np.ndarray]:
    """Entries that can be in one batch, by their kind."""
    buckets: dict[Hashable, list[int]] = {}
    for entry, kind in enumerate(kinds):
        buckets.setdefault(kind, []).append(entry)
    return [np.array(bucket) for bucket in buckets.values()]
