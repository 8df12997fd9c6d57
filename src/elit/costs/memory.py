"""Cost of a training run before it is started, on fake tensors: memory of a device, FLOPs of an iteration, GPU-days."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from elit.budgets import training_budgets
from elit.compat import fake_tensors, storage_number
from elit.config import TrainConfig, require
from elit.costs.flops import training_tflops
from elit.models.layers import weight_groups
from elit.models.presets import create_model


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Cost of one run; bytes are for one device, in float32."""

    parameters: int
    groups: dict[str, int]  # Weights by what moves them.
    weights: int  # Bytes of the weights, or of this device's shard of them; gradients are as many.
    optimizer: int  # Bytes of Adam's two moments and Muon's one, or of a shard.
    average: int  # Bytes of the averaged weights, or of a shard; 0 where they are kept on the CPU.
    gathered: int  # Sharded: of what is whole at one time: two blocks, what is outside of blocks, summed gradients.
    noise: int  # Bytes of the whole batch's noise, on every device, so that any number of them draws the same.
    activations: int  # Kept for the backward pass of a micro-batch at the largest budget.
    activations_checkpointed: int  # The same with gradient checkpointing.
    peak: int  # At most: activations go as gradients come, so only the larger of the two counts.
    tflops: float  # TFLOPs an iteration: 3 × forward × batch, mean over the budgets drawn (the paper's Table 1).
    device_days: float  # Days of one device for all steps; of n devices, an n-th.


def estimate(
    config: TrainConfig, *, devices: int = 1, device_tflops: float = 989.0, utilisation: float = 0.4
) -> Estimate:
    """Cost of `config` on `devices` devices, copied or sharded, of `device_tflops` at a share of `utilisation`."""
    micro = devices * config.gradient_accumulation
    if devices < 1 or config.batch_size % micro:
        parts = f"{config.gradient_accumulation} accumulated micro-batches on each of them"
        raise ValueError(f"devices={devices}: batch_size={config.batch_size} must divide into {parts}")
    require(device_tflops > 0, "device_tflops", device_tflops, "above 0")
    require(0 < utilisation <= 1, "utilisation", utilisation, "above 0 and at most 1")
    with torch.device("meta"):
        model = create_model(**config.model.arguments())
    drawn = training_budgets(model.budgets, config.budget_min, config.budget_max)
    tflops = training_tflops(model, config.batch_size, drawn or (None,))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    weights = weight_groups(model, model.blocks, config.optimizer)
    groups = {kind: sum(weight.numel() for weight in each) for kind, each in weights.items()}
    batch, largest = config.batch_size // micro, max(drawn, default=None)
    whole, inputs = (activation_bytes(config, batch, largest, checkpointing=on) for on in (False, True))
    # The inputs of all blocks, and one block whole while its turn comes in the backward pass.
    checkpointed = inputs + math.ceil((whole - inputs) / len(model.blocks))
    shard, gathered = parameters, 0
    if config.fsdp and devices > 1:
        shard = math.ceil(parameters / devices)
        blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in model.blocks]
        gathered = 2 * max(blocks) * (2 if config.precision == "bf16" else 4) + 4 * (parameters - sum(blocks))
        gathered += 4 * parameters * (config.gradient_accumulation > 1)  # gradients, until the last micro-batch
    average = 0 if config.ema_on_cpu else 4 * shard * (1 + len(config.ema_more))
    optimizer = 8 * shard - 4 * shard * groups.get("muon", 0) // parameters
    noise = 4 * config.batch_size * model.config.in_channels * math.prod(model.sample_size)
    kept = max(4 * shard, checkpointed if config.gradient_checkpointing else whole)
    return Estimate(
        parameters=parameters,
        groups=groups,
        weights=4 * shard,
        optimizer=optimizer,
        average=average,
        gathered=gathered,
        noise=noise,
        activations=whole,
        activations_checkpointed=checkpointed,
        peak=4 * shard + optimizer + average + gathered + noise + kept,
        tflops=tflops,
        device_days=config.steps * tflops / (device_tflops * utilisation) / 86_400,
    )


def activation_bytes(config: TrainConfig, batch: int, budget: int | None, *, checkpointing: bool) -> int:
    """Bytes that autograd keeps of a forward on a GPU, weights not counted, each storage once."""
    with fake_tensors():
        model = create_model(**config.model.arguments())
        if checkpointing:
            model.enable_gradient_checkpointing()
        x = torch.zeros(batch, model.config.in_channels, *model.sample_size)
        t, y = torch.zeros(batch), model.conditioning.example(batch)

        weights = {storage_number(parameter) for parameter in model.parameters()}
        sizes: dict[int, int] = {}
        alive: list[Tensor] = []  # a freed storage's number may come again

        def keep(value: Tensor) -> Tensor:
            if (number := storage_number(value)) not in weights:
                sizes[number] = value.untyped_storage().nbytes()
                alive.append(value)
            return value

        autocast = torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16")
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value), autocast:
            torch.nn.functional.mse_loss(model(x, t, y, budget).float(), x)
        return sum(sizes.values())
