"""Single latents left out, for the playground until its page needs them no more."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from elit.evaluate.inspect.attention import interface_of
from elit.models.interface import LatentInterface
from elit.models.layers import Rope
from elit.models.transformer import Transformer


@contextmanager
def only_latents(model: Transformer, slots: Sequence[int]) -> Iterator[int]:
    """Inside the block the network has these of its latents alone, each in its own place; gives their number, which
    must be the budget of every forward there.

    What is dropped is not computed, as with a budget; `slots` = 0 … J̃ − 1 is budget J̃. The others keep their RoPE
    coordinates. Read's latents are exchanged by a hook and the coordinates by a method of this one object, both gone
    after the block, so that a network that nobody looks at knows nothing of this.
    Raises ValueError for a baseline, slots that are not there, not ascending, or no valid budget together.
    """
    interface, indices = interface_of(model), torch.as_tensor(slots)
    if not isinstance(interface, LatentInterface):  # the published SiT reads all its latents at every budget
        raise ValueError(f"model: {type(model).__name__} uses its dropped latents too; give another ELIT model")
    valid, step = len(interface.latents), model.budget_step
    ascending = all(a < b for a, b in pairwise(slots))
    if not len(slots) or not ascending or not 0 <= slots[0] <= slots[-1] < valid or len(slots) not in model.budgets:
        raise ValueError(f"slots={list(slots)}: give some of 0 to {valid - 1}, ascending, a multiple of {step} of them")
    indices = indices.to(interface.latents.device)
    of_class = model.rope

    def rope(grid: tuple[int, ...], num_latents: int | None, x: Tensor) -> Rope:
        if num_latents is None:
            return of_class(grid, None, x)
        whole = of_class(grid, valid, x)  # of all latents of every group, slot by slot
        return Rope(*(table.unflatten(0, (-1, valid))[:, indices].flatten(0, 1) for table in whole))

    hook = interface.reader.register_forward_pre_hook(lambda _, inputs: (interface.latents[indices], *inputs[1:]))
    model.rope = rope
    try:
        yield len(slots)
    finally:
        hook.remove()
        del model.rope


def single_drops(model: Transformer) -> list[list[int]]:
    """What `losses_without` drops, one after the other: each slot; where budgets are multiples (HDiT), each merged
    group of slots. Empty where there is but one."""
    step, count = model.budget_step, len(interface_of(model).latents)
    drops = [list(range(first, first + step)) for first in range(0, count, step)]
    return drops if len(drops) > 1 else []
