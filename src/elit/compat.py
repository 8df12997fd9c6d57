"""Names that other packages call private, or never promised, each with our reason and the version it came with."""

import dataclasses
import functools
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map as tree_map, tree_map_only as tree_map_only

# tree_map: `change` of every leaf of nested dictionaries, lists and tuples. torch 2.0; torch.func is made of it.


def fake_tensors() -> AbstractContextManager[Any]:
    """Makes tensors that have shapes and no content. torch 2.0; the public way, torch.export, needs a whole graph."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def storage_number(value: Tensor) -> int:
    """A number of the storage of a tensor, also of a fake one, which has no data_ptr. torch 2.0."""
    return value.untyped_storage()._cdata


def lerp_all(targets: list[Tensor], sources: list[Tensor], share: float) -> None:
    """target += share · (source − target) for all, in a few kernels. torch 2.0, as in swa_utils."""
    torch._foreach_lerp_(targets, sources, share)


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copies every source into its target, in a few kernels instead of one each. torch 2.0."""
    torch._foreach_copy_(targets, sources)


def whole_graphs_under_ddp() -> AbstractContextManager[Any]:
    """Keeps torch.compile from cutting graphs, of single blocks here, where DDP's buckets end. torch 2.0."""
    return torch._dynamo.config.patch(optimize_ddp=False)


LONE_PROCESS = "torch.distributed is disabled"  # Torch 2.3 warns so where one process saves or loads alone.


@contextmanager
def lone_process() -> Iterator[None]:
    """Silences that warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", LONE_PROCESS)
        yield


def refused_global(error: BaseException) -> str | None:
    """The global that torch.load(weights_only=True) refused, as "os.system"; None for any other error. torch 2.6."""
    match = re.search(r"[Uu]nsupported (?:global: )?GLOBAL ([\w.]+)", str(error))
    return match[1] if match else None


# Starts of torch's messages for a loader process that has died, and for an error inside one, which lives on. torch 1.1.
DEAD_WORKER, CAUGHT = "DataLoader worker (pid", "Caught"


def is_dead_worker(error: BaseException) -> bool:
    """True if a loader process has died: it is silent, or a tensor that it shared is gone."""
    if isinstance(error, RuntimeError):
        return str(error).startswith(DEAD_WORKER)
    return not str(error).startswith(CAUGHT)


CHECKPOINT_FUNCTION = "_gradient_checkpointing_func"
"""Attribute of a diffusers model: the function through which its forward runs blocks in training. diffusers 0.32."""


def checkpointing_through(wrap: Callable[..., Any]) -> property:
    """A property for `CHECKPOINT_FUNCTION`: the function that diffusers sets, as wrap(function, block, *inputs)."""

    def get(model: nn.Module) -> Callable[..., Any]:
        return functools.partial(wrap, vars(model).get(CHECKPOINT_FUNCTION))

    def put(model: nn.Module, function: Callable[..., Any] | None) -> None:
        vars(model)[CHECKPOINT_FUNCTION] = function

    return property(get, put)


def register_block_like(subclass: type, kind: type) -> None:
    """Makes diffusers' caches, which look blocks up by class, treat `subclass` as `kind`. diffusers 0.35."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    TransformerBlockRegistry._register()
    if (known := TransformerBlockRegistry._registry.get(kind)) is not None:
        fresh = dataclasses.replace(known, _cls=None, _cached_parameter_indices=None)
        TransformerBlockRegistry.register(subclass, fresh)


def execution_device(pipeline: Any) -> torch.device:
    """The device that a pipeline computes on, offloading included. diffusers 0.10; its own pipelines use it."""
    return pipeline._execution_device


def is_hook(module: nn.Module) -> bool:
    """Its own `forward` calls the class's between hooks of diffusers or accelerate. diffusers 0.32, accelerate 0.10."""
    return hasattr(module, "_diffusers_hook") or hasattr(module, "_hf_hook")


def remove_hooks(module: nn.Module, kind: type) -> None:
    """Takes forward hooks off that are methods of a `kind`. torch 2.0; their handles do not outlive a pickle."""
    for number, hook in list(module._forward_hooks.items()):
        if isinstance(getattr(hook, "__self__", None), kind):
            del module._forward_hooks[number]


def is_quantised(weight: Tensor) -> bool:
    """Stored otherwise than as the numbers that it is: by torchao's subclasses, bitsandbytes or GGUF in bytes."""
    plain = type(weight.data) is Tensor or hasattr(weight, "device_mesh")
    return not (plain and weight.is_floating_point() and weight.dtype.itemsize > 1)


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype a model computes in, as quantised layers and hooks have it. bitsandbytes 0.39, diffusers 0.32."""
    hooks: Any = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    holders = [*(hook for each in hooks if each is not None for hook in each.hooks.values()), *model.modules()]
    named = [dtype for each in holders if isinstance(dtype := getattr(each, "compute_dtype", None), torch.dtype)]
    if named:
        return named[0]
    sizes: dict[torch.dtype, int] = {}
    for weight in model.parameters():
        if weight.is_floating_point() and weight.dtype.itemsize > 1:
            sizes[weight.dtype] = sizes.get(weight.dtype, 0) + weight.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


RESET_CACHE = "_reset_stateful_cache"
"""Method of a diffusers model that pipelines call behind a run: it empties all caches. diffusers 0.35."""


def reset_caches(model: Any, branch: str | None) -> None:
    """Empties all caches in the middle of a run, and names the branch that runs again."""
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    getattr(model, RESET_CACHE)()
    _set_cache_context(model, None if branch is None else CacheContext(branch))


def skips_layer(block: nn.Module) -> bool:
    """A guider lets the whole block be skipped. diffusers 0.34."""
    return "layer_skip_hook" in getattr(getattr(block, "_diffusers_hook", None), "hooks", ())


def guided_branch(frame: Any) -> str | None:
    """The branch that a modular pipeline runs, by the loop over its guider's batches that calls. diffusers 0.36."""
    from diffusers.guiders import BaseGuidance

    while frame is not None and "guider_state_batch" not in frame.f_code.co_varnames:
        frame = frame.f_back
    batch = None if frame is None else frame.f_locals.get("guider_state_batch")
    return None if batch is None else getattr(batch, BaseGuidance._identifier_key, "").removeprefix("pred_") or None


def quantization_of(config: Any, part: str) -> Any:
    """The part of a PipelineQuantizationConfig for one model of the pipeline, or None. diffusers 0.34."""
    return config._resolve_quant_config(is_diffusers=True, module_name=part)


def dispatched(model: Any, whole: str, device_map: Any, max_memory: Any, offload_folder: Any) -> Any:
    """A model spread as from_pretrained does, no `whole` split. diffusers 0.20; its classes of blocks are private."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    if isinstance(device_map, str):
        kinds: Any = [*(model._no_split_modules or ()), whole]
        if device_map != "sequential":
            low = device_map == "balanced_low_0"
            max_memory = get_balanced_memory(model, max_memory, no_split_module_classes=kinds, low_zero=low)
        device_map = infer_auto_device_map(model, max_memory=max_memory, no_split_module_classes=kinds)
    if set(device_map) == {""}:  # accelerate finds no weights to put on disk under that name
        device_map = {name: device_map[""] for name, _ in model.named_children()}
    return dispatch_model(model, device_map, offload_dir=offload_folder)


def forward_device(module: nn.Module) -> torch.device:
    """The device of a module's first weight or, where that is offloaded, of its forward. accelerate 0.10."""
    device = next(module.parameters()).device
    hooks = (getattr(each, "_hf_hook", None) for each in module.modules()) if device.type == "meta" else ()
    targets = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((target for target in targets if target is not None), device))


def forget_precision() -> None:
    """Lets a process that has made an Accelerator make another, in another precision. accelerate 0.10."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


LORA_WEIGHT, WRAPPED_LAYER = "lora_", ".base_layer."  # In names of LoRA's weights, and of those it wraps. peft 0.5.


def inception_network(weights: str | None) -> tuple[nn.Module, nn.Module]:
    """TensorFlow's Inception of 2015, giving (features, logits without bias), and the layer behind sFID's features."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    outputs = ["2048", "logits_unbiased"]
    network = FeatureExtractorInceptionV3("inception", outputs, feature_extractor_weights_path=weights)
    return network, network.Mixed_6d.branch1x1
