"""A task of training: the seam between the loop and those who have something to train."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from accelerate import Accelerator
from torch import nn

from elit.config import RunConfig
from elit.data.loader import StepSampler
from elit.training.ema import AveragedWeights
from elit.training.logger import RunLog


class Task(Protocol):
    """A network, its data and what a run leaves: all that `training/loop.py` does not know."""

    config: RunConfig
    """Complete: what the data decides is filled in."""
    network: nn.Module
    """Holds what is trained, the parameters that require a gradient."""
    blocks: Iterable[nn.Module]
    """Its blocks, which are compiled, sharded and checkpointed one by one."""
    budgets: Sequence[int]
    """The budgets of which one is drawn for a step; none for a baseline."""
    flops: dict[int | None, int]
    """FLOPs of a sample's training step, by budget."""
    examples: Any
    """A data set whose `__getitems__` gives (samples, conditions), both with `.to`."""
    sampler: StepSampler
    identity: dict[str, object] = {}  # noqa: RUF012
    """Classes, count and a stamp of the data's files, as JSON, compared when a run resumes."""

    def initialize(self, *, resumed: bool) -> list[str]:
        """The rest of what a run needs, once its folder is claimed, and the weights that a new one starts from.

        `flops`, `examples` and `sampler` may be set here. Returns lines to print.
        """
        ...

    def objective(self, accelerator: Accelerator) -> Any:
        """The objective, with two methods that are functions of their arguments, so that runs repeat.

        `draw(step)` gives what chance decides, tensors (B, ...) for the whole batch, the same on every process.
        `losses(model, batch, draws, budget)` gives t (b,) and losses (b,) of a micro-batch and its rows of the draws.
        """
        ...

    def preview(self, accelerator: Accelerator, average: AveragedWeights, log: RunLog, step: int) -> None:
        """Writes a picture of what the averaged weights do."""
        ...

    def finish(self, accelerator: Accelerator, average: AveragedWeights) -> Any:
        """Saves what the run leaves, and returns what it gives back."""
        ...
