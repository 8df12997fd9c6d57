"""A run's state on disk: written by all processes at once, whole or not at all, and read by any number of them.

A checkpoint is a folder in torch's distributed format (weights, their average, Adam's moments), the network's
config.json, and checkpoint.json, which comes last and vouches for the rest.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from elit._version import __version__
from elit.compat import copy_all, lerp_all, lone_process
from elit.config import RunConfig
from elit.files import fingerprint, leaving_nothing, write_text
from elit.models.saved import MANIFEST, checkpoint_step, checkpoints
from elit.training.distributed import broadcast_from_main, trained_weights, unsharded

TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # reading has checked that all are there
BYTES_A_WEIGHT = 16  # float32: the weight, its average, Adam's two moments


@contextmanager
def claimed_folder(config: RunConfig, accelerator: Accelerator, parameters: int) -> Iterator[None]:
    """A run's folder, held by a lock; raises ValueError where it cannot be used. A refused run leaves no folder."""
    out = Path(config.out)
    lock = FileLock(out / "logs" / ".lock")

    def claim() -> None:
        try:
            (out / "logs").mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"out={config.out!r}: another run is writing there; give another folder") from None
        except OSError as error:
            raise ValueError(f"cannot write out={config.out!r}: {error.strerror}; give another place") from None
        kept = config.keep_last + 1 + (config.steps // config.keep_every if config.keep_every else 0)
        more = max(kept - len(checkpoints(out / "checkpoints")), 1)
        need, free = parameters * (BYTES_A_WEIGHT * more + 4) / 2**30, shutil.disk_usage(out).free / 2**30
        if free < need:
            room = f"{free:.2f} GiB free, {need:.2f} wanted for {more} more checkpoints and the model"
            raise ValueError(f"out={config.out!r}: {room}; make room, give another folder, or keep fewer")

    with leaving_nothing(out, unless="config.yaml") if accelerator.is_main_process else nullcontext():
        try:
            broadcast_from_main(accelerator, claim)
            yield
        finally:
            lock.release()


class AveragedWeights:
    """Exponential moving average of a network's trained parameters, as diffusers' EMAModel has it, shard by shard."""

    def __init__(self, network: nn.Module, decay: float, *, on_cpu: bool = False):
        self.decay, self.steps = decay, 0
        trained = {name: weight.detach() for name, weight in network.named_parameters() if weight.requires_grad}
        place = "cpu" if on_cpu else next(network.parameters()).device
        # The average by name, DTensors where the network is sharded.
        self.weights = {name: weight.to(place, copy=True) for name, weight in trained.items()}

    @torch.no_grad()
    def step(self, network: nn.Module) -> None:
        """Moves towards the network's weights of now."""
        self.steps += 1
        decay = min(self.decay, self.steps / (9 + self.steps)) if self.steps > 1 else 0.0
        average, now = _shards(self.weights.values()), _shards(trained_weights(network))
        lerp_all(average, [weight.to(average[0].device) for weight in now], 1 - decay)

    @contextmanager
    @torch.no_grad()
    def in_place_of(self, network: nn.Module) -> Iterator[None]:
        """Lends the average to a network. FSDP2 keeps the root's weights gathered until it is told to give them up."""
        sharded = [module for module in network.modules() if isinstance(module, FSDPModule)]
        for module in sharded:
            module.reshard()
        shards = _shards(trained_weights(network))
        own_weights = [shard.clone() for shard in shards]
        copy_all(shards, _shards(self.weights.values()))
        try:
            yield
        finally:
            for module in sharded:
                module.reshard()
            copy_all(shards, own_weights)

    def whole(self) -> dict[str, Tensor]:
        """The average on the CPU, no longer sharded; every process must call it."""

        def whole(weight: Tensor) -> Tensor:  # by way of the mesh's device: NCCL takes nothing from the CPU's memory
            there = weight.to(weight.device_mesh.device_type) if isinstance(weight, DTensor) else weight
            return (there.full_tensor() if isinstance(there, DTensor) else there).cpu()

        return {name: whole(weight) for name, weight in self.weights.items()}


def _shards(weights: Iterable[Tensor]) -> list[Tensor]:
    """This process's parts, without gradients."""
    return [(each.to_local() if isinstance(each, DTensor) else each).detach() for each in weights]


class RunState(NamedTuple):
    """The content of a checkpoint."""

    network: Any
    optimizers: list[torch.optim.Optimizer]
    average: AveragedWeights

    def tensors(self) -> dict[str, Any]:
        weights, moments = get_state_dict(self.network, self.optimizers, options=TRAINED)
        averages = {"average": self.average.weights, "averaged_steps": self.average.steps}
        return {"model": weights, "optimizer": moments, **averages}


def save_state(
    accelerator: Accelerator, state: RunState, config: RunConfig, identity: dict[str, object], step: int
) -> None:
    """Writes the state to resume after `step` steps, each process its part; drops old checkpoints. Raises OSError."""
    folder = Path(config.out) / "checkpoints"
    target = folder / f"step-{step:08d}"
    temporary = folder / f".{target.name}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        with lone_process():
            dcp.save(state.tensors(), checkpoint_id=temporary, no_dist=not dist.is_initialized())
    except (CheckpointException, OSError) as error:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        reason, last = " ".join(str(cause).split()), next(reversed(checkpoints(folder)), "none")
        fault = f"checkpoint of step {step}: cannot be written ({reason})"
        raise OSError(f"{fault}; last good checkpoint: {last}; make room and resume") from None
    written = {path.name: fingerprint(path) for path in temporary.glob(f"__{accelerator.process_index}_*")}
    files = {name: value for part in gather_object([written]) for name, value in part.items()}
    if accelerator.is_main_process:
        with torch.device("meta"):
            unsharded(state.network).save_config(temporary)
        files |= {name: fingerprint(temporary / name) for name in (".metadata", "config.json")}
        versions = {"elit": __version__, "torch": torch.__version__}
        manifest = {"step": step, "processes": accelerator.num_processes, **versions, "data": identity}
        write_text(temporary / MANIFEST, json.dumps(manifest | {"files": dict(sorted(files.items()))}, indent=1) + "\n")
        if target.exists():  # a damaged one, passed over when the run went on
            shutil.rmtree(target)
        temporary.replace(target)
        for old in checkpoints(folder)[: -config.keep_last]:
            if not config.keep_every or checkpoint_step(old) % config.keep_every:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_state(path: Path, state: RunState) -> None:
    """Puts back what `save_state` saved, however many processes did, sharded or not."""
    now = [{**group, "params": []} for optimizer in state.optimizers for group in optimizer.param_groups]
    tensors = state.tensors()
    with lone_process():
        dcp.load(tensors, checkpoint_id=path, no_dist=not dist.is_initialized())
    weights = {"model_state_dict": tensors["model"], "optim_state_dict": tensors["optimizer"]}
    set_state_dict(state.network, state.optimizers, **weights, options=TRAINED)
    groups = [group for optimizer in state.optimizers for group in optimizer.param_groups]
    for group, settings in zip(groups, now, strict=True):  # what the config says now, not what it said
        group.update(settings | {"params": group["params"]})
    state.average.steps = tensors["averaged_steps"]
