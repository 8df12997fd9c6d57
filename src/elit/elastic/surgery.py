"""elastify: the core of a pretrained diffusers transformer works on a budgeted number of its tokens.

    x --head blocks--> tokens (B, N, d) --Read--> (B, K, d) --core blocks--> (B, K, d) --Write--> (B, N, d) --tail--> y

diffusers' forward stays as it is. The transformer and its core blocks change their class, to subclasses of the same
name, as torch's parametrizations do: so hooks, caches, LoRA, offloading, copies and pickles meet ordinary modules.
`runtime.py` has what happens in a forward.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    ContextParallelConfig,
    DiffusionPipeline,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
)
from torch import Tensor

from elit.budgets import Budget, budget_block, equal_parts, is_list, resolve_budget
from elit.compat import CHECKPOINT_FUNCTION, checkpointing_through, register_block_like
from elit.elastic.context import (
    branch,
    budget_of_references,
    budgets_of_call,
    bypassed,
    has_guidance_budget,
    original,
    within,
)
from elit.elastic.cost import count_block_flops
from elit.elastic.families import Family, all_blocks, family_of
from elit.elastic.families.family import Model
from elit.elastic.interface import ElasticInterface
from elit.elastic.kept_tokens import kept_tokens
from elit.elastic.runtime import PLAIN, Call, CoreBlock, HintBlock, checkpointed, current_call, signature_of
from elit.elastic.storage import InterfaceRecord, sample_weights, save_beside
from elit.elastic.trees import Arguments, Tree, map_tensors


def elastify(
    model: Model,
    *,
    read_after: int | None = None,
    write_after: int | None = None,
    window: Sequence[int] | None = None,
    mode: str = "carry",
    seed: int = 0,
) -> Tree:
    """Gives a diffusers transformer, or those of a pipeline, a latent interface, in place; returns `model`.
    `elit.budget` then sets its budget.

    read_after, write_after: how many of its blocks lie before Read and before Write; by default in the paper's
    proportion, 8 and 52 of 60. Flux counts on from its double to its single blocks. window: tokens of a window along
    each axis, (rows, columns) or (frames, rows, columns), at most: a grid that they do not divide gets smaller ones. A
    window has as many latents, and `transformer.budgets` lists the budgets. By default one that suits the class.
    mode: "carry", which equals the original at full budget before any training, or "learned", the paper's own.
    seed: of the new weights.

    Comes before caches, offloading and other hooks on forward, before or after LoRA.
    Raises ValueError for a class that is not supported, blocks and windows that do not fit, a second time, and a
    pipeline without a transformer.
    """
    transformers = [model]
    if isinstance(model, DiffusionPipeline):  # Wan 2.2 has two, and some of its versions the second one alone
        parts = [model.components.get(name) for name in ("transformer", "transformer_2")]
        transformers = [part for part in parts if part is not None]
        if not transformers:
            raise ValueError(f"model must have its transformer loaded, got a {type(model).__name__} without one")
    for transformer in transformers:  # before the first of them is changed
        if isinstance(transformer, Elastic):
            raise ValueError("cannot elastify a transformer twice: load it anew for another interface")
        family_of(transformer)
    for transformer in transformers:
        _elastify(transformer, read_after, write_after, window, mode, seed)
    return model


def default_blocks(depth: int) -> tuple[int, int]:
    """Read and Write of `depth` blocks, in the paper's proportion for a pretrained model: after 8 and 52 of 60."""
    outer = min(max(1, round(depth * 8 / 60)), (depth - 1) // 2)
    return outer, depth - outer


def _elastify(
    transformer: Model,
    read_after: int | None,
    write_after: int | None,
    window: Sequence[int] | None,
    mode: str,
    seed: int,
) -> None:
    family, blocks = family_of(transformer), all_blocks(transformer)
    first, last = default_blocks(len(blocks))
    record = InterfaceRecord(
        kind=type(transformer).__name__,
        read_after=first if read_after is None else read_after,
        write_after=last if write_after is None else write_after,
        window=tuple(family.window(transformer) if window is None else window),
        mode=mode,
    )
    _check(family, len(blocks), record)
    if getattr(transformer, "latent_interface", None) is not None:
        raise ValueError("cannot elastify a network with a latent interface of its own: give a baseline")
    if any("forward" in vars(module) for module in (transformer, *blocks)):
        raise ValueError("cannot elastify a transformer with hooks on its forward: elastify it first, then set those")
    width, heads = family.sizes(transformer)
    entry = blocks[record.read_after]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        condition_width = family.condition_width(transformer, entry)
        interface = ElasticInterface(width, heads, record.window, condition_width, carry=mode == "carry")
    transformer.elastic_record = record
    transformer.elastic_samples = sample_weights(transformer)
    interface.to(next(entry.parameters()).device, transformer.dtype)
    transformer.elastic = interface.train(transformer.training)
    _become(transformer, BranchedElastic if hasattr(transformer, "cache_context") else Elastic)
    joined = {block for name in family.joined for block in getattr(transformer, name)}
    for number in range(record.read_after, record.write_after):
        block = blocks[number]
        _become(block, CoreBlock)
        vars(block)["writes"] = number == record.write_after - 1
        vars(block)["joined"] = block in joined
    for number, module in family.hints(transformer).items():
        if record.read_after <= number < record.write_after - 1:  # behind the last core block are all tokens again
            _become(module, HintBlock)


def _check(family: Family, depth: int, record: InterfaceRecord) -> None:
    if not 0 <= record.read_after < record.write_after <= depth:
        raise ValueError(
            f"read_after and write_after must satisfy 0 <= read_after < write_after <= {depth}, the number of blocks, "
            f"got {record.read_after} and {record.write_after}"
        )
    if len(record.window) != family.axes or min(record.window) < 1:
        raise ValueError(f"window must have {family.axes} sides of at least 1 token, got {record.window}")
    if record.mode not in ("carry", "learned"):
        raise ValueError(f"mode must be carry or learned, got {record.mode!r}")


class Elastic:
    """The mixin of an elastified transformer, in front of its diffusers class."""

    elastic: ElasticInterface
    elastic_record: InterfaceRecord
    elastic_samples: dict[str, Tensor]

    @property
    def budgets(self) -> tuple[int, ...]:
        """Latents per window, ascending."""
        return tuple(range(1, prod(self.elastic_record.window) + 1))

    def added_flops(self: Model, sample_size: Sequence[int], budget: Budget) -> int:
        """FLOPs of a forward of this library's DiT above the original's, of one sample; below 0 where it saves."""
        grids = (self.token_grid(list(sample_size)),)
        blocks = count_block_flops(self, tokens=grids, budget=resolve_budget(budget, self.budgets))
        return blocks - count_block_flops(self, tokens=grids, interface=False)

    @torch.compiler.disable(recursive=False)
    def elastic_forward(self: Model, **arguments: Tree) -> Tree:
        """One forward at the budget of `elit.budget`; in two halves where a batch holds both branches of guidance."""
        if bypassed.get():
            with within(current_call, PLAIN):
                return super().forward(**arguments)  # pyrefly: ignore[missing-attribute]
        cache = getattr(self, "_cache_config", None)
        if isinstance(cache, FasterCacheConfig | PyramidAttentionBroadcastConfig) and has_guidance_budget():
            name = type(cache).__name__.removesuffix("Config")
            raise ValueError(f"guidance is not supported with {name}, which keeps one state for both branches")
        x = arguments[family_of(self).sample]
        if not len(x):
            raise ValueError(f"{family_of(self).sample} must have at least one sample")
        share_head = arguments.pop("share_head", False)
        budgets = self._budgets_of(arguments, x, share_head)
        if share_head:
            return _joined([self._elastic_run(arguments, count) for count in budgets])
        if len(set(budgets)) == 1:
            return self._elastic_run(arguments, budgets[0])
        size = len(x) // len(budgets)
        outputs = []
        for number, count in enumerate(budgets):
            rows = slice(number * size, (number + 1) * size)
            chunk = {name: _rows_of(value, rows, len(x), isinstance(x, list)) for name, value in arguments.items()}
            outputs.append(self._elastic_run(chunk, count))
        return _joined(outputs)

    def _budgets_of(self: Model, arguments: Arguments, x: Tree, share_head: bool) -> Tree:
        """The budgets of equal chunks of the batch: this library's networks take them as an argument."""
        given = arguments.pop("budget", None)
        if given is not None and budget_block.get() is not None:
            raise ValueError("cannot take a budget inside elit.budget: this network takes it as an argument, as always")
        if is_list(given):
            budgets = [resolve_budget(each, self.budgets) for each in given]
            if not share_head and len(x) % len(budgets):
                raise ValueError(f"budget must be a list that divides a batch of {len(x)}, got {len(budgets)} budgets")
            return budgets if share_head else equal_parts(budgets)
        if given is not None:
            return [resolve_budget(given, self.budgets)]
        family = family_of(self)
        return budgets_of_call(
            self.budgets,
            lambda: family.noise(arguments),
            family.unconditional_half,
            # Stable Diffusion 3 guides by skipping layers in a forward of the conditional branch alone.
            one_branch=arguments.get("skip_layers") is not None,
            unlabelled=x if family.unlabelled_branches else None,
        )

    @torch.compiler.disable(recursive=False)
    def _elastic_run(self: Model, arguments: Arguments, budget: int) -> Tree:
        family, record, full = family_of(self), self.elastic_record, self.budgets[-1]
        grids, references = family.grids(self, arguments), family.num_references(self, arguments)
        own = budget_of_references(self.budgets, lambda: family.noise(arguments)) if references else None
        budgets = (budget,) * (len(grids) - references) + (budget if own is None else own,) * references
        if record.original_at_full and min(budgets) == full:
            with original(), within(current_call, PLAIN):
                return super().forward(**arguments)  # pyrefly: ignore[missing-attribute]
        if min(budgets) < full:
            reasons = dict.fromkeys(family.residuals, "its residuals are for all tokens") | dict(family.full_only)
            for name, reason in reasons.items():
                if arguments.get(name) is not None:
                    raise ValueError(f"{name} is not supported below full budget: {reason}")
        if record.write_after - 1 in (arguments.get("skip_layers") or ()):
            raise ValueError(f"skip_layers must leave out {record.write_after - 1}, the block that Write comes behind")
        sample = arguments[family.sample]
        kept = kept_tokens(grids, record.window, budgets, sample[0].device)
        with within(current_call, Call(self.elastic, family, kept, arguments)):
            return super().forward(**arguments)  # pyrefly: ignore[missing-attribute]

    def enable_parallelism(self: Model, *, config: Tree, **kwargs: Tree) -> None:
        """diffusers' own. Raises ValueError for context parallel: it spreads a window's tokens over devices."""
        if isinstance(config, ContextParallelConfig) or getattr(config, "context_parallel_config", None) is not None:
            raise ValueError("context parallel is not supported: Read needs a window's tokens on one device")
        super().enable_parallelism(config=config, **kwargs)  # pyrefly: ignore[missing-attribute]

    def save_pretrained(self: Model, save_directory: str | Path, *args: Tree, **kwargs: Tree) -> None:
        """diffusers' own, without the interface; that lies beside it, and `elit.load_elastic` reads both.

        Where the original weights have changed since `elastify`, they are saved as the variant "elastic": alone they
        are no model, and a plain from_pretrained finds no weights then instead of the wrong ones.
        """
        # pyrefly: ignore[missing-attribute]
        save_beside(self, save_directory, functools.partial(super().save_pretrained, *args, **kwargs))


class BranchedElastic(Elastic):
    """An elastified transformer of a class whose pipelines run the branches of guidance one after the other."""

    def enable_cache(self: Model, config: Tree) -> None:
        """diffusers' own. Raises ValueError for FirstBlockCache where the first block is in the core.

        It compares and keeps what that block gives, which below full budget are latents, and skips Write with the rest.
        """
        if self.elastic_record.read_after == 0 and isinstance(config, FirstBlockCacheConfig):
            raise ValueError("read_after must be at least 1 with FirstBlockCache, which needs a block before Read")
        super().enable_cache(config)  # pyrefly: ignore[missing-attribute]

    @contextmanager
    def cache_context(self: Model, name: str, **kwargs: Tree) -> Iterator[None]:
        """diffusers' own context, by which pipelines say which branch runs."""
        with branch(name), super().cache_context(name, **kwargs):  # pyrefly: ignore[missing-attribute]
            yield


def _become(module: Model, mixin: Model) -> None:
    kind: Model = type(module)
    module.__class__ = _elastic_class(kind, mixin)


@functools.cache
def _elastic_class(kind: Model, mixin: Model) -> Tree:
    """A subclass of the same name: by it diffusers saves a model, and finds its LoRA scales and pipeline slots."""

    @torch.compiler.disable(recursive=False)
    @functools.wraps(kind.forward)
    def forward(self: Model, *args: Tree, **kwargs: Tree) -> Tree:
        return self.elastic_forward(**signature_of(kind).bind(*args, **kwargs).arguments)

    def reduce(self: Model) -> Tree:
        return _rebuild, (kind, mixin), self.__dict__

    body: dict[str, Any] = {
        "forward": forward,
        "__reduce__": reduce,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
    }
    if issubclass(mixin, Elastic):  # Read and Write stay outside of what is run again in the backward pass
        body[CHECKPOINT_FUNCTION] = checkpointing_through(checkpointed)
    subclass = type(kind.__name__, (mixin, kind), body)
    register_block_like(subclass, kind)
    return subclass


def _rebuild(kind: Model, mixin: Model) -> Tree:
    subclass = _elastic_class(kind, mixin)
    return subclass.__new__(subclass)


def _rows_of(value: Tree, rows: slice, batch: int, listed: bool) -> Tree:
    """The rows of everything with the batch in front. listed: lists have an entry a sample, too."""
    if isinstance(value, list) and listed:
        return value[rows]
    return map_tensors(lambda tensor: tensor[rows] if tensor.ndim and len(tensor) == batch else tensor, value)


def _joined(outputs: Sequence[Tree]) -> Tree:
    """The outputs for the chunks of a batch as that of the batch."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(list(outputs))
    if isinstance(first, list):  # one tensor a sample
        return [each for output in outputs for each in output]
    if isinstance(first, tuple):
        return tuple(_joined(parts) for parts in zip(*outputs, strict=True))
    return type(first)(**{name: _joined([output[name] for output in outputs]) for name in first})
