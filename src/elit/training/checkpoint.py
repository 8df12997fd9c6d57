"""A run's state on disk, in torch's distributed format; checkpoint.json comes last and vouches for the rest."""

import json
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from elit._version import __version__
from elit.compat import copy_all, lerp_all, lone_process, tree_map
from elit.config import WAIT, RunConfig
from elit.files import fingerprint, leaving_nothing, write_text
from elit.models.saved import MANIFEST, checkpoint_step, checkpoints
from elit.training.distributed import broadcast_from_main, trained_weights, unsharded

T = TypeVar("T")
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
        need = parameters * ((BYTES_A_WEIGHT + 4 * len(config.ema_more)) * more + 4) / 2**30
        free = shutil.disk_usage(out).free / 2**30
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

    def __init__(self, network: nn.Module, decay: float, *, name: str = "model", on_cpu: bool = False):
        self.decay, self.name, self.steps = decay, name, 0  # name: of the folder in which it is saved
        trained = {name: weight.detach() for name, weight in network.named_parameters() if weight.requires_grad}
        place = "cpu" if on_cpu else next(network.parameters()).device
        # By name, DTensors where the network is sharded.
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
    return [(each.to_local() if isinstance(each, DTensor) else each).detach() for each in weights]


class RunState(NamedTuple):
    """The content of a checkpoint."""

    network: Any
    optimizers: list[torch.optim.Optimizer]
    averages: list[AveragedWeights]  # the first is what the run is for

    def tensors(self) -> dict[str, Any]:
        weights, moments = get_state_dict(self.network, self.optimizers, options=TRAINED)
        first, *more = self.averages
        averages = {"average": first.weights, "averaged_steps": first.steps}
        averages |= {each.name: each.weights for each in more}
        return {"model": weights, "optimizer": moments, **averages}


class CheckpointWriter(AbstractContextManager[None]):
    """Writes checkpoints, each process its part; with `async_checkpoints` in a thread, one at a time."""

    def __init__(self, accelerator: Accelerator, state: RunState, config: RunConfig, identity: dict[str, object]):
        self.accelerator, self.state, self.config, self.identity = accelerator, state, config, identity
        self.folder = Path(config.out) / "checkpoints"
        self.thread, self.pending, self.copy = ThreadPoolExecutor(1), Future[None](), None
        self.pending.set_result(None)
        # A group of its own: in a thread, its messages must not queue behind gradients.
        self.group = dist.new_group(backend="gloo", timeout=WAIT) if dist.is_initialized() else None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.thread.shutdown()
        if kind is None:
            self.wait()

    def save(self, step: int) -> None:
        """Saves the state after `step` steps; waits for the checkpoint before. Raises OSError of either."""
        self.wait()
        tensors = self.state.tensors()
        if not self.config.async_checkpoints:
            return self._write(tensors, step)
        self.copy = tree_map(_on_cpu, tensors if self.copy is None else self.copy, tensors)
        self.pending = self.thread.submit(self._write, self.copy, step)

    def wait(self) -> None:
        """Waits for the checkpoint in the background. Raises OSError where it could not be written."""
        self.pending.result()

    def _gather(self, value: T) -> list[T]:
        values = [value] * self.accelerator.num_processes
        if self.group:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def _write(self, tensors: dict[str, Any], step: int) -> None:
        folder, main = self.folder, self.accelerator.is_main_process
        target = folder / f"step-{step:08d}"
        temporary = folder / f".{target.name}.tmp"
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self._gather(None)
        try:
            with lone_process():
                dcp.save(tensors, checkpoint_id=temporary, process_group=self.group, no_dist=self.group is None)
        except (CheckpointException, OSError) as error:
            if main:
                shutil.rmtree(temporary, ignore_errors=True)
            cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            reason, last = " ".join(str(cause).split()), next(reversed(checkpoints(folder)), "none")
            fault = f"checkpoint of step {step}: cannot be written ({reason})"
            raise OSError(f"{fault}; last good checkpoint: {last}; make room and resume") from None
        written = {path.name: fingerprint(path) for path in temporary.glob(f"__{self.accelerator.process_index}_*")}
        files = {name: value for part in self._gather(written) for name, value in part.items()}
        if main:
            with torch.device("meta"):
                unsharded(self.state.network).save_config(temporary)
            files |= {name: fingerprint(temporary / name) for name in (".metadata", "config.json")}
            versions = {"elit": __version__, "torch": torch.__version__}
            manifest = {"step": step, "processes": self.accelerator.num_processes, **versions, "data": self.identity}
            manifest["files"] = dict(sorted(files.items()))
            write_text(temporary / MANIFEST, json.dumps(manifest, indent=1) + "\n")
            if target.exists():  # a damaged one, skipped when the run resumed
                shutil.rmtree(target)
            temporary.replace(target)
            for old in checkpoints(folder)[: -self.config.keep_last]:
                if not self.config.keep_every or checkpoint_step(old) % self.config.keep_every:
                    shutil.rmtree(old)
        self._gather(None)


def _on_cpu(copy: Any, value: Any) -> Any:
    """The value, of a tensor a copy, in the memory of the last one where there is one."""
    if not isinstance(value, Tensor):
        return value
    if copy is value:
        return value.detach().to("cpu", copy=True)
    copy_all(_shards([copy]), _shards([value]))
    return copy


def load_state(path: Path, state: RunState) -> None:
    """Puts back what `CheckpointWriter` saved, however many processes did, sharded or not."""
    now = [{**group, "params": []} for optimizer in state.optimizers for group in optimizer.param_groups]
    tensors = state.tensors()
    with lone_process():
        dcp.load(tensors, checkpoint_id=path, no_dist=not dist.is_initialized())
    weights = {"model_state_dict": tensors["model"], "optim_state_dict": tensors["optimizer"]}
    set_state_dict(state.network, state.optimizers, **weights, options=TRAINED)
    groups = [group for optimizer in state.optimizers for group in optimizer.param_groups]
    for group, settings in zip(groups, now, strict=True):  # what the config says now, not what it said
        group.update(settings | {"params": group["params"]})
    for average in state.averages:
        average.steps = tensors["averaged_steps"]
