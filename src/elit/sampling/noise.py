"""Seeds and the noise that they stand for."""

from collections.abc import Sequence

import torch
from torch import Tensor

from elit.config import require

Seed = int | torch.Generator


def sample_seeds(seed: Seed | Sequence[Seed], count: int) -> list[Seed]:
    """One seed a sample: counting up from `seed`, or those given. Raises ValueError for another number of them."""
    if isinstance(seed, torch.Generator):
        return [seed] * count
    if isinstance(seed, int):
        return [seed + i for i in range(count)]
    require(len(seed) == count, "seeds", len(seed), f"1, or {count}, one a sample")
    return list(seed)


def seeded_noise(seeds: Sequence[Seed], shape: Sequence[int]) -> Tensor:
    """(B, *shape) standard normal on the CPU, each sample from its own seed, so equal on every device.

    A generator is drawn from on its own device, once for each sample that names it.
    """
    draws = []
    for seed in seeds:
        source = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        draws.append(torch.randn(*shape, generator=source, device=source.device).cpu())
    return torch.stack(draws)
