"""Several processes as one run: sharding, compiling, and agreeing on what to do."""

import os
import signal
import threading
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from elit.compat import forget_precision
from elit.config import WAIT, DistillConfig, RunConfig
from elit.models.transformer import Transformer

T = TypeVar("T")


def make_accelerator(config: RunConfig) -> Accelerator:
    """The engine of a run. Raises ValueError where the launcher and the config do not agree."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        # accelerate shards on GPUs alone, with one precision for all parts; elit's own way runs on CPUs too.
        raise ValueError("ACCELERATE_USE_FSDP is set: launch with distributed_type MULTI_GPU and give --fsdp instead")
    for tracker in config.trackers:  # accelerate would go on without it
        if find_spec(tracker) is None:
            raise ValueError(f"trackers={tracker!r}: not installed; pip install {tracker}, or leave it out")
    forget_precision()  # a process may train twice, the second time in another precision
    return Accelerator(
        kwargs_handlers=[
            # The text stream of a pretrained transformer's last block may go nowhere.
            DistributedDataParallelKwargs(find_unused_parameters=isinstance(config, DistillConfig)),
            InitProcessGroupKwargs(timeout=WAIT),
        ],
        # The loop divides by the micro-batches; accelerate would too, for a number in the environment.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        cpu=not torch.accelerator.is_available(),  # else processes started by torchrun would not find each other
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(logging_dir=str(Path(config.out) / "logs")),
    )


def trained_weights(network: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in network.parameters() if weight.requires_grad]


def prepare(accelerator: Accelerator, network: Any, blocks: Iterable[nn.Module], config: RunConfig) -> nn.Module:
    """The network as a step calls it: on its device, compiled, sharded (FSDP2) or replicated (DDP)."""
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    for block in blocks if config.compile else ():
        # The method and not the module: hooks of FSDP stay outside, names of weights as they are. Blocks of one class
        # share their graphs, one for N tokens and one for any number.
        block.forward = torch.compile(block.forward, fullgraph=True)
    if not (config.fsdp and dist.is_initialized()):
        return accelerator.prepare_model(network)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    plain = MixedPrecisionPolicy(cast_forward_inputs=False)
    low = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=low if accelerator.mixed_precision == "bf16" else plain)
    interface = getattr(network, "elastic", None) or network.latent_interface
    for part in (*((interface.reader, interface.writer) if interface else ()), network):
        fully_shard(part, mesh=mesh, mp_policy=plain)
    return network


def unsharded(network: Transformer) -> Transformer:
    """A new network without weights, of the class and settings of one in front of which sharding has put its own."""
    kind = next(kind for kind in type(network).__mro__ if not kind.__name__.startswith("FSDP"))
    return kind.from_config(network.config)


def clip_gradients(network: nn.Module, max_norm: float) -> Tensor:
    """Scales all gradients to a common norm of at most max_norm; returns the norm before, on the device."""
    for weight in trained_weights(network):
        if weight.grad is None:  # Adam has moments for each, and checkpoints are whole
            weight.grad = torch.zeros_like(weight)
    norm = nn.utils.clip_grad_norm_(network.parameters(), max_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def broadcast_from_main(accelerator: Accelerator, check: Callable[[], T]) -> T:
    """The main process's result of `check`, on all processes; its ValueError is raised by all."""
    answer: Any = None
    if accelerator.is_main_process:
        try:
            answer = check()
        except ValueError as error:
            answer = error
    (answer,) = broadcast_object_list([answer])
    if isinstance(answer, ValueError):
        raise answer
    return answer


class Termination:
    """Notices SIGTERM and Ctrl-C, and has all processes notice at the same step; a second Ctrl-C leaves at once."""

    def __init__(self, accelerator: Accelerator):
        self.signal = ""  # the one that was noticed
        self.before: dict[int, Any] = {}
        # A group of its own: its questions must not queue behind gradients.
        self.group = dist.new_group(backend="gloo", timeout=WAIT) if accelerator.num_processes > 1 else None
        self.question: tuple[Tensor, dist.Work] | None = None

    def __enter__(self) -> "Termination":
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._notice) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.question is not None and kind in (None, SystemExit):
            self.question[1].wait()  # a process that has gone would leave the other waiting for its answer
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def should_stop(self) -> bool:
        """Once a step: this process's own signal; of several processes, any that was met a step ago."""
        if self.group is None:
            return bool(self.signal)
        earlier, flag = self.question, torch.tensor(int(bool(self.signal)))
        self.question = (flag, dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group, async_op=True))
        if earlier is None:
            return False
        earlier[1].wait()
        return bool(earlier[0])

    def _notice(self, number: int, *_: object) -> None:
        self.signal = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        if number == signal.SIGINT:
            signal.signal(number, self.before[number])
