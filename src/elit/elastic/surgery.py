"""elastify: the core of a pretrained diffusers transformer works on a budgeted number of its tokens.

    x --head blocks--> tokens (B, N, d) --Read--> (B, K, d) --core blocks--> (B, K, d) --Write--> (B, N, d) --tail--> y

diffusers' forward stays as it is. The transformer and its core blocks change their class, to subclasses of the same
name, as torch's parametrizations do: so hooks, caches, LoRA, offloading, copies and pickles meet ordinary modules.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import prod
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from elit import compat
from elit.budgets import Budget, equal_parts, is_list, resolve_budget
from elit.elastic.context import (
    REPLACED,
    UNSET,
    budgets_of_call,
    bypassed,
    calling_pipeline,
    current_block,
    current_branch,
    original,
    within,
)
from elit.elastic.cost import count_block_flops
from elit.elastic.families import all_blocks, family_of
from elit.elastic.families.family import Arguments, Model, Tree
from elit.elastic.interface import ElasticInterface, LowRank, kept_tokens
from elit.elastic.record import PIPELINE, InterfaceRecord, sample_weights, settings_of, write_interface
from elit.elastic.runtime import PLAIN, Call, CoreBlock, check_forwards, checkpointed, current_call, signature_of
from elit.files import write_text

VARIANT = "elastic"
ONE_STATE = diffusers.FasterCacheConfig | diffusers.PyramidAttentionBroadcastConfig  # for both branches of guidance
SIZED_CACHES = ONE_STATE | diffusers.TaylorSeerCacheConfig  # what they keep is as long as the tokens


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
    if isinstance(model, diffusers.DiffusionPipeline):  # Wan 2.2 has two, and some of its versions the second one alone
        parts = [model.components.get(name) for name in ("transformer", "transformer_2")]
        if parts == [None, None]:
            raise ValueError(f"model must have its transformer loaded, got a {type(model).__name__} without one")
        for part in parts:
            if part is not None:
                elastify(part, read_after=read_after, write_after=write_after, window=window, mode=mode, seed=seed)
        return model
    if isinstance(model, Elastic):
        raise ValueError("cannot elastify a transformer twice: load it anew for another interface")
    family, blocks = family_of(model), all_blocks(model)
    first, last = default_blocks(len(blocks))
    first, last = first if read_after is None else read_after, last if write_after is None else write_after
    sides = tuple(family.window(model) if window is None else window)
    if not 0 <= first < last <= len(blocks):
        valid = f"0 <= read_after < write_after <= {len(blocks)}, the number of blocks"
        raise ValueError(f"read_after and write_after must satisfy {valid}, got {first} and {last}")
    if len(sides) != family.axes or min(sides) < 1:
        raise ValueError(f"window must have {family.axes} sides of at least 1 token, got {sides}")
    if mode not in ("carry", "learned"):
        raise ValueError(f"mode must be carry or learned, got {mode!r}")
    if getattr(model, "latent_interface", None) is not None:
        raise ValueError("cannot elastify a network with a latent interface of its own: give a baseline")
    check_forwards(model, "elastify a transformer", "elastify it first, then set those")
    width, heads = family.sizes(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        condition_width = family.condition_width(model, blocks[first])
        interface = ElasticInterface(width, heads, sides, condition_width, carry=mode == "carry")
    places = {"read_after": first, "write_after": last, "window": sides, "mode": mode}
    model.elastic_record = InterfaceRecord(kind=type(model).__name__, **places, config=settings_of(model))
    model.elastic_samples = sample_weights(model)
    interface.to(next(blocks[first].parameters()).device, compat.compute_dtype(model))
    model.elastic = interface.train(model.training)
    _become(model, Elastic)
    joined = {block for name in family.joined for block in getattr(model, name)}
    for number, block in enumerate(blocks[first:last], first):
        _become(block, CoreBlock, writes=number == last - 1, joined=block in joined)
    for number, module in family.hints(model).items():
        if first <= number < last - 1:  # behind the last core block are all tokens again
            _become(module, CoreBlock, hint=True)
    return model


def unload_elastic(model: Model) -> Tree:
    """Takes the dial off a transformer, or those of a pipeline, in place, and its low-rank changes; returns `model`.
    Raises ValueError where there is none, where all weights were trained along with it, and under hooks on forward."""
    each: Tree = model.components.values() if isinstance(model, diffusers.DiffusionPipeline) else [model]
    if not (parts := [part for part in each if hasattr(part, "elastic_record")]):
        raise ValueError(f"cannot take a dial off a {type(model).__name__}: it has none")
    for part in parts:
        if part.weights_changed():
            raise ValueError("cannot take the dial off weights that were trained along: load the original instead")
        check_forwards(part, "take the dial off a transformer", "disable caches and offloading first")
        for module in list(part.modules()):
            compat.remove_hooks(module, LowRank)
            if isinstance(module, Elastic | CoreBlock):
                module.__class__ = vars(type(module))["original_class"]
                for name in ("elastic_record", "elastic_samples", "elastic_lengths", "writes", "joined", "hint"):
                    vars(module).pop(name, None)
        del part.elastic
    return model


def default_blocks(depth: int) -> tuple[int, int]:
    """Read and Write of `depth` blocks, in the paper's proportion for a pretrained model: after 8 and 52 of 60."""
    outer = min(max(1, round(depth * 8 / 60)), (depth - 1) // 2)
    return outer, depth - outer


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
        family, block = family_of(self), current_block.get()
        if block is not None:
            block.used = True
        if bypassed.get():
            return self._plain_run(arguments)
        cache = getattr(self, "_cache_config", None)
        one_state = isinstance(cache, ONE_STATE)
        if one_state and block is not None and block.guidance is not UNSET:
            name = type(cache).__name__.removesuffix("Config")
            raise ValueError(f"guidance is not supported with {name}, which keeps one state for both branches")
        x = arguments[family.sample]
        # This library's networks take budgets of equal parts of the batch as an argument.
        share_head, given, reference = arguments.pop("share_head", False), arguments.pop("budget", None), None
        if given is None:
            budgets, reference = budgets_of_call(family, arguments, self.budgets)
        elif block is not None:
            raise ValueError("cannot take a budget inside elit.budget: this network takes it as an argument, as always")
        else:
            budgets = [resolve_budget(each, self.budgets) for each in (given if is_list(given) else [given])]
        if share_head:
            return _joined([self._elastic_run(arguments, count, reference) for count in budgets])
        if len(x) % len(budgets):
            raise ValueError(f"budget must be a list that divides a batch of {len(x)}, got {len(budgets)} budgets")
        budgets = equal_parts(budgets)
        if len(budgets) == 1:
            return self._elastic_run(arguments, budgets[0], reference)
        size, outputs = len(x) // len(budgets), []
        for number, count in enumerate(budgets):
            rows = slice(number * size, (number + 1) * size)
            chunk = {name: _rows_of(value, rows, len(x), isinstance(x, list)) for name, value in arguments.items()}
            outputs.append(self._elastic_run(chunk, count, reference))
        return _joined(outputs)

    @torch.compiler.disable(recursive=False)
    def _plain_run(self: Model, arguments: Arguments) -> Tree:
        with within(current_call, PLAIN):
            return super().forward(**arguments)  # pyrefly: ignore[missing-attribute]

    @torch.compiler.disable(recursive=False)
    def _elastic_run(self: Model, arguments: Arguments, budget: int, reference: int | None) -> Tree:
        family, record, full = family_of(self), self.elastic_record, self.budgets[-1]
        grids, references = family.grids(self, arguments), family.num_references(self, arguments)
        own = budget if reference is None else reference
        budgets = (budget,) * (len(grids) - references) + (own,) * references
        if record.original_at_full and min(budgets) == full:
            with original():
                return self._plain_run(arguments)
        if min(budgets) < full:
            reasons = dict.fromkeys(family.residuals, "its residuals are for all tokens") | dict(family.full_only)
            for name, reason in reasons.items():
                if arguments.get(name) is not None:
                    raise ValueError(f"{name} is not supported below full budget: {reason}")
        self._keep_caches(budgets)
        block: Model = dict(enumerate(all_blocks(self))).get(record.write_after - 1)
        if not getattr(block, "writes", False):
            raise ValueError(f"cannot run a transformer with another list of blocks: {REPLACED}")
        if compat.skips_layer(block) or record.write_after - 1 in (arguments.get("skip_layers") or ()):
            raise ValueError(f"skip_layers must leave out {record.write_after - 1}, the block that Write comes behind")
        kept = kept_tokens(grids, record.window, budgets, arguments[family.sample][0].device)
        with within(current_call, Call(self.elastic, family, kept, arguments)):
            return super().forward(**arguments)  # pyrefly: ignore[missing-attribute]

    def _keep_caches(self: Model, budgets: tuple[int, ...]) -> None:
        """Resets a cache of attentions where the budget changes; FasterCache cannot begin in the middle of a run."""
        cache, branch = getattr(self, "_cache_config", None), current_branch.get()
        lengths = self.__dict__.setdefault("elastic_lengths", {})
        if lengths.get(branch, budgets) != budgets and isinstance(cache, SIZED_CACHES):
            if isinstance(cache, diffusers.FasterCacheConfig):
                raise ValueError("budget must stay the same in a run with FasterCache, whose state is for its tokens")
            compat.reset_caches(self, branch)
        lengths[branch] = budgets

    def enable_parallelism(self: Model, *, config: Tree, **kwargs: Tree) -> None:
        """diffusers' own. Raises ValueError for context parallel: it spreads a window's tokens over devices."""
        own = isinstance(config, diffusers.ContextParallelConfig)
        if own or getattr(config, "context_parallel_config", None) is not None:
            raise ValueError("context parallel is not supported: Read needs a window's tokens on one device")
        super().enable_parallelism(config=config, **kwargs)  # pyrefly: ignore[missing-attribute]

    @functools.wraps(diffusers.ModelMixin.save_pretrained, assigned=())  # pipelines pass on what its signature has
    def save_pretrained(self: Model, save_directory: str | Path, *args: Tree, **kwargs: Tree) -> None:
        """diffusers' own, without the interface; that lies beside it, and `elit.load_elastic` reads both."""
        if any(compat.WRAPPED_LAYER in name for name, _ in self.named_parameters()):
            # diffusers would write them under names that from_pretrained does not find.
            raise ValueError("cannot save a transformer with LoRA adapters: delete or fuse them, or save_lora_adapter")
        folder, record = Path(save_directory), dataclasses.replace(self.elastic_record, changed=self.weights_changed())
        # If this stops half way, the remains do not load as a whole model.
        for path in folder.glob("diffusion_pytorch_model*"):
            if record.changed and f".{VARIANT}" not in path.name:
                path.unlink()
        save = super().save_pretrained  # pyrefly: ignore[missing-attribute]
        given = inspect.signature(save).bind(folder, *args, **kwargs)
        if record.changed:
            given.arguments["variant"] = "-".join(filter(None, (VARIANT, given.arguments.get("variant"))))
        if given.arguments.get("is_main_process", True):
            write_interface(folder, self.elastic.state_dict(), record)  # first: diffusers may upload the folder
            if (frame := calling_pipeline("save_pretrained")) is not None:
                kinds = [each.__name__ for each in type(frame.f_locals["self"]).__mro__ if "__call__" in vars(each)]
                known = [name for name in kinds if hasattr(diffusers, name)]
                if known:
                    write_text(folder.parent / "pipeline.py", PIPELINE.format(known[0]))
        with self.without_interface():
            save(*given.args, **given.kwargs)

    def weights_changed(self: Model) -> bool:
        """The original weights have been trained since `elastify`, or before it was saved."""
        now, then = sample_weights(self), self.elastic_samples
        same = (torch.equal(now[name], then[name].to(now[name].dtype)) for name in then if name in now)
        return self.elastic_record.changed or not all(same)

    @contextmanager
    def merging(self: Model) -> Iterator[None]:
        """A LoRA added to the weights inside the block is no training: alone they are still a model."""
        self.elastic_record = dataclasses.replace(self.elastic_record, changed=self.weights_changed())
        yield
        self.elastic_samples = sample_weights(self)

    @contextmanager
    def adapting(self: Model) -> Iterator[None]:
        """Adapters of the block go on the original's layers alone; like those, the interface is then frozen."""
        with self.without_interface():
            yield
        self.elastic.requires_grad_(False)

    @contextmanager
    def forgetting(self: Model) -> Iterator[Tree]:
        yield vars(self).pop("elastic_lengths", None)

    def fuse_qkv_projections(self: Model) -> None:
        """diffusers' own. Raises ValueError with low-rank changes, which sit on the layers that it replaces."""
        if self.elastic_record.lora_rank or hasattr(self.elastic, "low_rank"):
            raise ValueError("cannot fuse projections that have low-rank changes of the dial: leave them apart")
        super().fuse_qkv_projections()  # pyrefly: ignore[missing-attribute]

    @contextmanager
    def without_interface(self: Model) -> Iterator[None]:
        """Its other modules alone are there inside the block."""
        interface = self.elastic
        del self.elastic
        try:
            yield
        finally:
            self.elastic = interface

    def enable_cache(self: Model, config: Tree) -> None:
        """diffusers' own; not FirstBlockCache of a block in the core, which would keep latents and skip Write."""
        if self.elastic_record.read_after == 0 and isinstance(config, diffusers.FirstBlockCacheConfig):
            raise ValueError("read_after must be at least 1 with FirstBlockCache, which needs a block before Read")
        super().enable_cache(config)  # pyrefly: ignore[missing-attribute]

    @contextmanager
    def cache_context(self: Model, name: str, **kwargs: Tree) -> Iterator[None]:
        """diffusers' own context, by which pipelines say which branch runs, "cond" or "uncond"; guiders "pred_cond"."""
        own = getattr(super(), "cache_context", None)  # a class without caches has none
        with within(current_branch, name.removeprefix("pred_")), own(name, **kwargs) if own else nullcontext():
            yield


def _become(module: Model, mixin: Model, **settings: bool) -> None:
    kind: Model = type(module)
    module.__class__ = _elastic_class(kind, mixin)
    vars(module).update(settings)


WRAPPED = {
    "fuse_lora": Elastic.merging,
    "unfuse_lora": Elastic.merging,
    "add_adapter": Elastic.adapting,
    "load_lora_adapter": Elastic.adapting,
    compat.RESET_CACHE: Elastic.forgetting,  # pipelines call it behind each run
}


def _inside(method: Callable[..., Tree], block: Callable[..., AbstractContextManager[Tree]]) -> Callable[..., Tree]:
    @functools.wraps(method)
    def wrapped(self: Model, *args: Tree, **kwargs: Tree) -> Tree:
        with block(self):
            return method(self, *args, **kwargs)

    return wrapped


class SameClass(type):
    """The kind of elastified classes: they equal their own, for what compares classes, but hash differently."""

    def __eq__(cls, other: object) -> bool:
        return cls is other or vars(cls).get("original_class") is other

    __hash__ = type.__hash__


@functools.cache
def _elastic_class(kind: Model, mixin: Model) -> Tree:
    """A subclass of the same name: by it diffusers saves a model, and finds its LoRA scales and pipeline slots."""

    @torch.compiler.disable(recursive=False)
    @functools.wraps(kind.forward)
    def forward(self: Model, *args: Tree, **kwargs: Tree) -> Tree:
        return self.elastic_forward(**signature_of(kind).bind(*args, **kwargs).arguments)

    def reduce(self: Model) -> Tree:
        return rebuild, (_elastic_class, kind, mixin), self.__dict__

    body: dict[str, Any] = {"forward": forward, "__reduce__": reduce, "original_class": kind}
    body |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    if issubclass(mixin, Elastic):  # Read and Write stay outside of what is run again in the backward pass
        body[compat.CHECKPOINT_FUNCTION] = compat.checkpointing_through(checkpointed)
        body |= {name: _inside(getattr(kind, name), block) for name, block in WRAPPED.items() if hasattr(kind, name)}
    metaclass = type(SameClass.__name__, (SameClass, type(kind)), {})
    subclass = metaclass(kind.__name__, (mixin, kind), body)
    compat.register_block_like(subclass, kind)
    return subclass


def rebuild(make: Callable[..., Model], *args: Model) -> Tree:
    return make(*args).__new__(make(*args))


def _rows_of(value: Tree, rows: slice, batch: int, listed: bool) -> Tree:
    """The rows of everything with the batch in front. listed: lists have an entry a sample, too."""
    if isinstance(value, list) and listed:
        return value[rows]
    return compat.tree_map_only(Tensor, lambda each: each[rows] if each.shape[:1] == (batch,) else each, value)


def _joined(outputs: Sequence[Tree]) -> Tree:
    """The outputs for the chunks of a batch as that of the batch; a list has one tensor a sample."""

    def join(*parts: Tree) -> Tree:
        return torch.cat(parts) if isinstance(parts[0], Tensor) else [each for part in parts for each in part]

    return compat.tree_map(join, *outputs, is_leaf=lambda node: isinstance(node, list))
