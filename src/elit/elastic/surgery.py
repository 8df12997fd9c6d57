"""elastify: the core of a pretrained diffusers transformer works on a budgeted number of its tokens.

    x --head blocks--> tokens (B, N, d) --Read--> (B, K, d) --core blocks--> (B, K, d) --Write--> (B, N, d) --tail--> y

diffusers' forward stays as it is. The transformer and its core blocks change their class, to subclasses of the same
name, as torch's parametrizations do: so hooks, caches, LoRA, offloading, copies and pickles see ordinary modules. What
happens in a forward is in `runtime.py`.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
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

from elit.arguments import shortened, whole_number, whole_numbers
from elit.budgets import Budget, budget_block, budgets_of_samples, equal_parts, is_list, resolve_budget
from elit.compat import CHECKPOINT_FUNCTION, checkpointing_through, register_block_like
from elit.elastic.context import branch, budget_of_references, budgets_of_call, has_guidance_budget
from elit.elastic.cost import count_block_flops
from elit.elastic.families import Family, all_blocks, family_of, joined_blocks
from elit.elastic.interface import ElasticInterface, placed
from elit.elastic.runtime import (
    PLAIN,
    Call,
    CoreBlock,
    HintBlock,
    active,
    bypassed,
    checkpointed,
    original,
    signature_of,
)
from elit.elastic.storage import InterfaceRecord, sample_weights, save_beside
from elit.elastic.token_order import make_token_order


def elastify(
    model: Any,
    *,
    read_after: int | None = None,
    write_after: int | None = None,
    window: Sequence[int] | None = None,
    mode: str = "carry",
    seed: int = 0,
) -> Any:
    """Gives a diffusers transformer, or those of a pipeline, a latent interface, in place; returns what it was given.
    `elit.budget` then sets its budget.

    read_after, write_after: how many of its blocks lie before Read and before Write; by default in the paper's
    proportion, 8 and 52 of 60. Flux counts on from its double to its single blocks. window: tokens of a group along
    each axis, (rows, columns) or (frames, rows, columns), at most: a grid that they do not divide gets smaller ones. A
    group has as many latents, and `transformer.budgets` lists the counts. By default one that suits the class.
    mode: "carry", which equals the original at full budget before any training, or "learned", the paper's own.
    seed: of the new weights.

    Comes before caches, offloading and other hooks on forward, before or after LoRA.
    Raises ValueError for a class that is not supported, blocks and windows that do not fit, a second time, and a
    pipeline without a transformer.
    """
    settings: dict[str, Any] = {
        "read_after": read_after,
        "write_after": write_after,
        "window": window,
        "mode": mode,
        "seed": whole_number("seed", seed),
    }
    if isinstance(model, DiffusionPipeline):
        for transformer in _transformers_of(model):
            _elastify(transformer, **settings)
    else:
        _elastify(model, **settings)
    return model


def _transformers_of(pipe: Any) -> list[Any]:
    """Wan 2.2 has two, and some of its versions the second one alone."""
    parts = [pipe.components.get(name) for name in ("transformer", "transformer_2")]
    if transformers := [part for part in parts if part is not None]:
        for part in transformers:
            if not isinstance(part, Elastic):
                family_of(part)  # before the first of them is changed
        return transformers
    raise ValueError(f"model: a {type(pipe).__name__} without a transformer; give one that has it loaded")


def default_blocks(depth: int) -> tuple[int, int]:
    """Read and Write of `depth` blocks, in the paper's proportion for a pretrained model: after 8 and 52 of 60."""
    outer = min(max(1, round(depth * 8 / 60)), (depth - 1) // 2)
    return outer, depth - outer


def _elastify(
    transformer: Any,
    *,
    read_after: int | None,
    write_after: int | None,
    window: Sequence[int] | None,
    mode: str,
    seed: int,
) -> None:
    if isinstance(transformer, Elastic):
        raise ValueError("transformer: is elastified already; load it anew for another interface")
    family = family_of(transformer)
    if getattr(transformer, "latent_interface", None) is not None:
        raise ValueError("transformer: has a latent interface of its own; give a baseline")
    blocks = all_blocks(transformer)
    first, last = default_blocks(len(blocks))
    read_after = first if read_after is None else whole_number("read_after", read_after)
    write_after = last if write_after is None else whole_number("write_after", write_after)
    window = whole_numbers("window", family.window(transformer) if window is None else window, "(4, 4)")
    _check(family, len(blocks), read_after, write_after, window, mode)
    if any("forward" in vars(module) for module in (transformer, *blocks)):
        raise ValueError(
            "transformer: has hooks on its forward (a cache, offloading); elastify it first, then set those"
        )
    width, heads = family.sizes(transformer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        condition_width = family.condition_width(transformer, blocks[read_after])
        interface = ElasticInterface(width, heads, prod(window), condition_width, carry=mode == "carry")
    device = next(blocks[read_after].parameters()).device
    record = InterfaceRecord(
        kind=type(transformer).__name__, read_after=read_after, write_after=write_after, window=window, mode=mode
    )
    transformer.elastic_record = record
    transformer.elastic_samples = sample_weights(transformer)
    transformer.elastic = placed(interface, device, transformer.dtype).train(transformer.training)
    branched = hasattr(transformer, "cache_context")
    _become(transformer, BranchedElastic if branched else Elastic)
    joined = joined_blocks(transformer)
    for number, block in enumerate(blocks[read_after:write_after], read_after):
        _become(block, CoreBlock)
        vars(block)["writes"] = number == write_after - 1
        vars(block)["joined"] = block in joined
    for number, module in family.hints(transformer).items():
        if read_after <= number < write_after - 1:  # behind the last core block are all tokens again
            _become(module, HintBlock)


class Elastic:
    """What an elastified transformer has in front of its diffusers class."""

    elastic: ElasticInterface
    elastic_record: InterfaceRecord
    elastic_samples: dict[str, Tensor]

    @property
    def budgets(self) -> tuple[int, ...]:
        """Valid counts of latents per window, ascending."""
        return tuple(range(1, prod(self.elastic_record.window) + 1))

    def added_flops(self: Any, sample_size: Sequence[int], budget: Budget) -> int:
        """What a forward of one sample of this library's DiT costs more than the original's; below 0 where it saves."""
        grids = (self.token_grid(list(sample_size)),)
        blocks = count_block_flops(self, tokens=grids, budget=resolve_budget(budget, self.budgets))
        return blocks - count_block_flops(self, tokens=grids, interface=False)

    @torch.compiler.disable(recursive=False)
    def elastic_forward(self: Any, **arguments: Any) -> Any:
        """One forward at the budget of `elit.budget`; in two halves where a batch holds both branches of guidance."""
        if bypassed.get():
            with active(PLAIN):
                return super().forward(**arguments)  # pyrefly: ignore[missing-attribute]
        cache = getattr(self, "_cache_config", None)
        if isinstance(cache, FasterCacheConfig | PyramidAttentionBroadcastConfig) and has_guidance_budget():
            raise ValueError(
                f"guidance: {type(cache).__name__.removesuffix('Config')} keeps one state for both branches, which "
                "then differ in length; leave `guidance` out of elit.budget, or disable the cache"
            )
        family = family_of(self)
        x = arguments[family.sample]
        if not all(isinstance(each, Tensor) for each in (x if isinstance(x, list) and x else [x])):
            raise TypeError(f"{family.sample}: a {type(x).__name__}, expected a tensor, or a list of them")
        if not len(x):
            raise ValueError(f"{family.sample}: an empty batch; give at least one sample")
        budgets: Sequence[int | None]
        given, branches = arguments.pop("budget", None), arguments.pop("branch_budgets", None)
        # This library's networks are handed theirs.
        if not (given is None and branches is None) and budget_block.get() is not None:
            raise ValueError(
                "elit.budget: this network is handed its budget, as elit.sample does; leave out one of the two"
            )
        if branches is not None:
            budgets = [resolve_budget(part, self.budgets) for part in branches]
        elif is_list(given):
            budgets = equal_parts(budgets_of_samples(given, len(x), self.budgets, "budget"))
        elif given is not None:
            budgets = [resolve_budget(given, self.budgets)]
        else:
            # Stable Diffusion 3 guides by skipping layers in a forward of the conditional branch alone.
            one_branch = arguments.get("skip_layers") is not None
            noise = functools.partial(family.noise, arguments)
            unnamed = x if family.unnamed_branches else None
            half = family.unconditional_half
            budgets = budgets_of_call(self.budgets, noise, half, one_branch=one_branch, unnamed=unnamed)
        if arguments.pop("shared", False):
            return _joined([self._elastic_run(arguments, count) for count in budgets])
        if len(set(budgets)) == 1:
            return self._elastic_run(arguments, budgets[0])
        if isinstance(x, list):  # an argument that is a list of tensors then has one a sample
            arguments = {
                name: OfSamples(value) if isinstance(value, list) else value for name, value in arguments.items()
            }
        parts = (_part_of(arguments, len(x), i, len(budgets)) for i in range(len(budgets)))
        return _joined([self._elastic_run(part, count) for part, count in zip(parts, budgets, strict=True)])

    @torch.compiler.disable(recursive=False)
    def _elastic_run(self: Any, arguments: dict[str, Any], budget: int) -> Any:
        family = family_of(self)
        grids = family.grids(self, arguments)
        looked_at = family.references(self, arguments)
        own = budget_of_references(self.budgets, functools.partial(family.noise, arguments)) if looked_at else None
        counts = (budget,) * (len(grids) - looked_at) + (budget if own is None else own,) * looked_at
        if self.elastic_record.original_at_full and min(counts) == self.budgets[-1]:
            with original(), active(PLAIN):
                return super().forward(**arguments)  # pyrefly: ignore[missing-attribute]
        if min(counts) < self.budgets[-1]:
            for name in family.residuals:
                if arguments.get(name) is not None:
                    raise ValueError(f"{name}: are residuals for all tokens; run them at full budget")
            for name, reason in family.full_only.items():
                if arguments.get(name) is not None:
                    raise ValueError(f"{name}: {reason}; run it at full budget")
        if self.elastic_record.write_after - 1 in (arguments.get("skip_layers") or ()):
            raise ValueError(
                f"skip_layers={arguments['skip_layers']}: its last core block cannot be skipped, Write is there"
            )
        sample = arguments[family.sample]
        device = (sample[0] if isinstance(sample, list) else sample).device
        order = make_token_order(grids, self.elastic_record.window, counts, device)
        with active(Call(self.elastic, family, order, arguments)):
            return super().forward(**arguments)  # pyrefly: ignore[missing-attribute]

    def enable_parallelism(self: Any, *, config: Any, **kwargs: Any) -> None:
        """diffusers' own. Raises ValueError for context parallel: it deals a window's tokens out over devices."""
        if isinstance(config, ContextParallelConfig) or getattr(config, "context_parallel_config", None) is not None:
            raise ValueError(
                "config: context parallel deals the tokens out over devices, and Read needs those of a window on one; "
                "run it without the dial, or the branches of guidance on a device each"
            )
        super().enable_parallelism(config=config, **kwargs)  # pyrefly: ignore[missing-attribute]

    def save_pretrained(self: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """diffusers' own, without the interface; that lies beside it, and `elit.load_elastic` reads both.

        Where the original weights have changed since `elastify`, they are saved as the variant "elastic": alone they
        are no model, and a plain from_pretrained finds no weights then instead of the wrong ones.
        """
        # pyrefly: ignore[missing-attribute]
        save_beside(self, save_directory, functools.partial(super().save_pretrained, *args, **kwargs))


class BranchedElastic(Elastic):
    """Of a class whose pipelines run the branches of guidance one after the other."""

    def enable_cache(self: Any, config: Any) -> None:
        """diffusers' own. Raises ValueError for FirstBlockCache where the first block is in the core.

        It compares and keeps what that block gives, which below full budget are latents, and skips Write with the rest.
        """
        if self.elastic_record.read_after == 0 and isinstance(config, FirstBlockCacheConfig):
            raise ValueError(
                "read_after=0: FirstBlockCache needs a first block before Read; elastify with read_after of at least 1"
            )
        super().enable_cache(config)  # pyrefly: ignore[missing-attribute]

    @contextmanager
    def cache_context(self: Any, name: str, **kwargs: Any) -> Iterator[None]:
        """diffusers' own context, by which pipelines say which branch runs."""
        with branch(name), super().cache_context(name, **kwargs):  # pyrefly: ignore[missing-attribute]
            yield


def _become(module: Any, mixin: Any) -> None:
    kind: Any = type(module)
    module.__class__ = _elastic_class(kind, mixin)


@functools.cache
def _elastic_class(kind: Any, mixin: Any) -> Any:
    """A subclass of the same name: by it diffusers saves a model, and finds its LoRA scales and pipeline slots."""

    @torch.compiler.disable(recursive=False)
    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.elastic_forward(**signature_of(kind).bind(*args, **kwargs).arguments)

    def reduce(self: Any) -> Any:
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


def _rebuild(kind: Any, mixin: Any) -> Any:
    subclass = _elastic_class(kind, mixin)
    return subclass.__new__(subclass)


class OfSamples(list[Any]):
    """A list with an entry a sample."""


def _part_of(value: Any, batch: int, part: int, parts: int) -> Any:
    """One of equal parts of everything with the batch in front."""
    if isinstance(value, Tensor) and value.ndim and len(value) == batch:
        return value.chunk(parts)[part]
    if isinstance(value, OfSamples):
        size = batch // parts
        return list(value[part * size : (part + 1) * size])
    if isinstance(value, Mapping):
        return {name: _part_of(each, batch, part, parts) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_part_of(each, batch, part, parts) for each in value)
    return value


def _joined(outputs: Sequence[Any]) -> Any:
    """The outputs for the parts of a batch as that of the batch."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(list(outputs))
    if isinstance(first, list):  # one tensor a sample
        return [each for output in outputs for each in output]
    if isinstance(first, tuple):
        return tuple(_joined(parts) for parts in zip(*outputs, strict=True))
    return type(first)(**{name: _joined([output[name] for output in outputs]) for name in first})


def _check(family: Family, depth: int, read_after: int, write_after: int, window: tuple[int, ...], mode: str) -> None:
    if not 0 <= read_after < write_after <= depth:
        raise ValueError(
            f"read_after={read_after}, write_after={write_after}: need 0 <= read_after < write_after <= {depth}, the "
            "number of its blocks"
        )
    if len(window) != family.axes or any(not isinstance(side, int) or side < 1 for side in window):
        raise ValueError(f"window={window}: give {family.axes} sides of at least 1 token")
    if mode not in ("carry", "learned"):
        raise ValueError(f"mode={shortened(mode)}: give carry or learned")
