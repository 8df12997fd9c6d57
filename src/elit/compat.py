"""Every name that torch, diffusers, accelerate, peft and torch-fidelity call private, or never promised, and we need.

Each has its reason and the version since which it is there. `tests/test_compat.py` asks the installed packages for all
of them one by one, so that an upgrade which takes one away says which. Nothing else in the library has such a name:
`tests/test_imports.py` looks.
"""

import dataclasses
import functools
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# --- torch -----------------------------------------------------------------------------------------------------------


def fake_tensors(*, mixed: bool = False) -> AbstractContextManager[Any]:
    """Inside the block tensors have shapes and no content, so that memory is counted and none is taken;
    mixed: real ones may take part.

    torch 2.0; the public way to them, torch.export, wants a whole graph.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=mixed)


def storage_number(value: Tensor) -> int:
    """Which storage a tensor lies in, for fake ones too, which have no data_ptr. torch 2.0.

    The number of a storage that is freed may come again.
    """
    return value.untyped_storage()._cdata


def write_count(value: Tensor) -> int:
    """How often a tensor was written to in place, except through `.data`. torch 1.0; there is no public way to ask."""
    return value._version


def lerp_all(targets: list[Tensor], ends: list[Tensor], share: float) -> None:
    """target += share · (end − target) for all, in a few kernels instead of one each. torch 2.0, as swa_utils does."""
    torch._foreach_lerp_(targets, ends, share)


def copy_all(targets: list[Tensor], sources: list[Tensor], *, non_blocking: bool = False) -> None:
    """Copies every source into its target, in a few kernels instead of one each. torch 2.0."""
    torch._foreach_copy_(targets, sources, non_blocking=non_blocking)


def whole_graphs_under_ddp() -> AbstractContextManager[Any]:
    """Inside the block torch.compile does not cut graphs where DDP's buckets end. torch 2.0.

    Blocks are compiled one by one, so cutting them gains nothing, and a cut inside one is a graph more.
    """
    return torch._dynamo.config.patch(optimize_ddp=False)


LONE_PROCESS = "torch.distributed is disabled"
"""How torch 2.3 and later warns that one process alone saves or loads a distributed checkpoint."""


@contextmanager
def lone_process() -> Iterator[None]:
    """Inside the block torch does not warn that one process alone saves or loads a distributed checkpoint."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", LONE_PROCESS)
        yield


def refused_global(error: BaseException) -> str | None:
    """What torch.load(weights_only=True) refused to make, such as "os.system"; None if it failed at something else.

    torch 2.4 ("Unsupported global: GLOBAL x") and 2.6; its UnpicklingError has no field for it.
    """
    match = re.search(r"[Uu]nsupported (?:global: )?GLOBAL ([\w.]+)", str(error))
    return match[1] if match else None


DEAD_WORKER = "DataLoader worker (pid"
"""How torch 1.0 and later begins the RuntimeError for a loader process that is gone."""
CAUGHT = "Caught"
"""How torch 1.1 and later begins what it raises for an error inside a loader process, which lives on."""


def is_dead_worker(error: BaseException) -> bool:
    """Whether a loader process is gone, by its silence or by a tensor that nobody hands over any more."""
    if isinstance(error, RuntimeError):
        return str(error).startswith(DEAD_WORKER)
    return not str(error).startswith(CAUGHT)


# --- diffusers -------------------------------------------------------------------------------------------------------

NO_FLOAT32_MODULES = "that should be kept in float32: []"
"""In what diffusers 0.42 warns of when a network is cast to a dtype, modules to be kept in float32 or none."""


@contextmanager
def quiet_cast() -> Iterator[None]:
    """Inside the block diffusers does not warn that a cast leaves out modules of which there are none."""
    logger = logging.getLogger("diffusers.models.modeling_utils")

    def says_something(record: logging.LogRecord) -> bool:
        return NO_FLOAT32_MODULES not in record.getMessage()

    logger.addFilter(says_something)
    try:
        yield
    finally:
        logger.removeFilter(says_something)


CHECKPOINT_FUNCTION = "_gradient_checkpointing_func"
"""Where a diffusers model keeps what its forward runs blocks through in training. diffusers 0.32."""


def checkpoint_block(model: nn.Module, block: nn.Module, *inputs: Any) -> Any:
    """`block(*inputs)`, run again in the backward pass as the model's `enable_gradient_checkpointing` says."""
    return getattr(model, CHECKPOINT_FUNCTION)(block, *inputs)


def checkpointing_through(wrap: Callable[..., Any]) -> property:
    """A property to stand under `CHECKPOINT_FUNCTION` in a model's subclass.

    What diffusers sets is kept; its forward gets a function that calls wrap(what was set, block, *inputs).
    """

    def get(model: nn.Module) -> Callable[..., Any]:
        return functools.partial(wrap, vars(model).get(CHECKPOINT_FUNCTION))

    def put(model: nn.Module, function: Callable[..., Any] | None) -> None:
        vars(model)[CHECKPOINT_FUNCTION] = function

    return property(get, put)


def register_block_like(subclass: type, kind: type) -> None:
    """Has diffusers' caches treat blocks of class `subclass` as those of `kind`, which they look up by class.

    diffusers 0.35; its register functions are for a package's own blocks, and the registry fills on first use.
    """
    from diffusers.hooks._helpers import TransformerBlockRegistry

    TransformerBlockRegistry._register()
    if (known := TransformerBlockRegistry._registry.get(kind)) is not None:
        fresh = dataclasses.replace(known, _cls=None, _cached_parameter_indices=None)
        TransformerBlockRegistry.register(subclass, fresh)


def execution_device(pipeline: Any) -> torch.device:
    """Where a pipeline computes, its offloading considered. diffusers 0.10; its own pipelines ask the same way."""
    return pipeline._execution_device


# --- accelerate ------------------------------------------------------------------------------------------------------


def forget_precision() -> None:
    """Lets a process that has made an Accelerator make another, in another precision. accelerate 0.10.

    The state is shared by all of them and refuses to change; accelerate's own tests reset it so.
    """
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


# --- peft ------------------------------------------------------------------------------------------------------------

LORA_WEIGHT, WRAPPED_LAYER = "lora_", ".base_layer."
"""What the names of LoRA's weights hold, and those of the weights it wraps. peft 0.5; diffusers relies on both."""

# --- torch-fidelity --------------------------------------------------------------------------------------------------


def inception_network(weights: str | None) -> tuple[nn.Module, nn.Module]:
    """TensorFlow's Inception of 2015, giving (features, logits without bias), and the layer behind sFID's features.

    torch-fidelity 0.3: neither class nor layer is in its documentation; weights: a file of its own, by default loaded.
    Raises ImportError, or RuntimeError where torchvision was built for another torch.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    outputs = ["2048", "logits_unbiased"]
    network = FeatureExtractorInceptionV3("inception", outputs, feature_extractor_weights_path=weights)
    return network, network.Mixed_6d.branch1x1
