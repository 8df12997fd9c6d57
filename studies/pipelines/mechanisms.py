"""Mechanisms on a transformer or pipeline beside the dial: LoRA, offloads, casting, caches, schedulers, compile."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import accelerate
import diffusers
import torch
from parts import PIPELINES, Run
from peft import LoraConfig

import elit

TORCHAO = importlib.util.find_spec("torchao") is not None
CPU = torch.device("cpu")
STEPS = 6  # of runs with a cache
FLUX, QWEN, WAN = "FluxPipeline", "QwenImagePipeline", "WanPipeline"


class Mechanism(NamedTuple):
    """Something set on a pipeline: on the plain one, and on the elastified one, from which on it has to agree."""

    pipeline: str
    set: Callable[[Any], Any]
    before: bool = False
    """Set before `elit.elastify`."""
    steps: int | None = None
    """Of its runs; None: those of the pipeline."""
    exact: bool = True
    """At full budget equal to the bit, not to 1e-4."""
    switched: bool = False
    """A step cache: it changes what the plain pipeline makes, and is tried with another budget from each step on."""


def lora(pipe: Any) -> None:
    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False))


def model_offload(pipe: Any) -> None:
    """The hook of enable_model_cpu_offload, with the CPU in the place of an accelerator."""
    accelerate.cpu_offload_with_hook(pipe.transformer, CPU)


def sequential_offload(pipe: Any) -> None:
    """The hooks of enable_sequential_cpu_offload, with the CPU in the place of an accelerator."""
    for part in (pipe.transformer, pipe.vae):
        accelerate.cpu_offload(part, CPU, offload_buffers=len(part._parameters) > 0)  # as diffusers does


def group_offload(kind: str) -> Callable[[Any], None]:
    groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}

    def set_on(pipe: Any) -> None:
        pipe.transformer.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=kind, **groups)

    return set_on


def casting(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def cache(make: Callable[[Any], Any]) -> Callable[[Any], None]:
    def set_on(pipe: Any) -> None:
        pipe.transformer.enable_cache(make(pipe))

    return set_on


def at_timestep(pipe: Any) -> dict[str, Any]:
    """Cached from the second step on."""
    return {
        "spatial_attention_timestep_skip_range": (-1, 990),
        "current_timestep_callback": lambda: int(pipe._current_timestep),
    }


def int8_weights(pipe: Any) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(pipe.transformer, Int8WeightOnlyConfig())


def scheduler(kind: str, **settings: Any) -> Callable[[Any], None]:
    def set_on(pipe: Any) -> None:
        pipe.scheduler = getattr(diffusers, kind)(**settings)

    return set_on


def compiled(pipe: Any) -> None:
    torch.compiler.reset()
    pipe.transformer.compile(backend="aot_eager")


def context_parallel(pipe: Any) -> None:
    pipe.transformer.enable_parallelism(config=diffusers.ContextParallelConfig(ring_degree=2))


CACHES: dict[str, Callable[[Any], Any]] = {
    "FirstBlockCache": lambda pipe: diffusers.FirstBlockCacheConfig(threshold=0.5),
    "MagCache": lambda pipe: diffusers.MagCacheConfig(num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS),
    "TaylorSeerCache": lambda pipe: diffusers.TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=1,
        max_order=1,
        cache_identifiers=[r".*block.*attn\d?"],  # the default ones find none in Wan
    ),
    "PyramidAttentionBroadcast": lambda pipe: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, **at_timestep(pipe)
    ),
    "FasterCache": lambda pipe: diffusers.FasterCacheConfig(
        tensor_format="BFCHW", unconditional_batch_timestep_skip_range=(-1, 990), **at_timestep(pipe)
    ),
    "FasterCache, is_guidance_distilled": lambda pipe: diffusers.FasterCacheConfig(
        is_guidance_distilled=True, **at_timestep(pipe)
    ),
    "SeaCache": lambda pipe: diffusers.SeaCacheConfig(),
    "TextKVCache": lambda pipe: diffusers.TextKVCacheConfig(),
}

ONLY = {"SeaCache": (WAN,), "FasterCache": (FLUX, QWEN, WAN, "CogVideoXPipeline")}
"""Pipelines of a cache that is not for the three common ones."""

MECHANISMS: dict[str, Mechanism] = {
    "LoRA, then the dial": Mechanism(FLUX, lora, before=True),
    "the dial, then LoRA": Mechanism(FLUX, lora),
    **({"int8 weights (torchao), then the dial": Mechanism(FLUX, int8_weights, before=True)} if TORCHAO else {}),
    "model CPU offload": Mechanism(FLUX, model_offload),
    "sequential CPU offload": Mechanism(FLUX, sequential_offload),
    "group offload, block level": Mechanism(FLUX, group_offload("block_level")),
    "group offload, leaf level": Mechanism(FLUX, group_offload("leaf_level")),
    "layerwise casting": Mechanism(FLUX, casting),
    **{
        f"{name} on {pipeline}": Mechanism(pipeline, cache(make), steps=STEPS, switched=name != "TextKVCache")
        for name, make in CACHES.items()
        for pipeline in ONLY.get(name, (FLUX, QWEN, WAN))
    },
    "a cache, then the dial": Mechanism(FLUX, cache(CACHES["FirstBlockCache"]), before=True),
    "FlowMatchHeunDiscreteScheduler": Mechanism(
        "StableDiffusion3Pipeline", scheduler("FlowMatchHeunDiscreteScheduler")
    ),
    "FlowMatchHeunDiscreteScheduler on Flux": Mechanism(FLUX, scheduler("FlowMatchHeunDiscreteScheduler")),
    "UniPCMultistepScheduler": Mechanism(
        WAN, scheduler("UniPCMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True)
    ),
    "torch.compile": Mechanism(FLUX, compiled, steps=2, exact=False),
    "context parallel": Mechanism(FLUX, context_parallel),
}


def run_of(mechanism: Mechanism) -> Run:
    run, steps = PIPELINES[mechanism.pipeline].run, mechanism.steps
    return run if steps is None else functools.partial(run, num_inference_steps=steps)


def elastic_with(mechanism: Mechanism) -> Any:
    """The pipeline with the dial and what is tried."""
    pipe = PIPELINES[mechanism.pipeline].make()
    if mechanism.before:
        mechanism.set(pipe)
    # A split for so few blocks, of which a cache wants one on each side.
    elit.elastify(pipe, read_after=1, write_after=3)
    if not mechanism.before:
        mechanism.set(pipe)
    return pipe
