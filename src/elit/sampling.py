"""From a network and labels to samples: the solver, the guidance and the budgets of every step, put together."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from elit.budgets import Schedule, schedule_budgets
from elit.flops import count_flops
from elit.flow.guidance import Branch, Guidance, branches, guided_velocity
from elit.flow.solver import get_solver, time_grid
from elit.models.conditioning import Condition, concatenate
from elit.models.transformer import Transformer, as_size


def sample(
    model: Transformer,
    y: Condition | Sequence[int] | int | Sequence[str] | str,
    *,
    steps: int = 40,
    budget: Schedule = None,
    guidance: Guidance | None = None,
    solver: str = "euler",
    seed: int | Sequence[int] = 0,
    shift: float = 1.0,
    sample_size: int | Sequence[int] | None = None,
    noise: Tensor | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Samples (B, C, H, W) or (B, C, T, H, W), float32 on the model's device; pixels in [-1, 1] or autoencoder cells.

    y: B labels, num_classes = no class; for a text-conditional network B prompts or their embeddings.
    steps: the paper uses 40 with "euler"; "heun" evaluates twice a step.
    budget: one for all steps, or a schedule: a list with one a step, a function of t, "0.5@0-0.5,1@0.5-1".
    guidance: elit.CFG, elit.AG or elit.CCFG. shift: more of the steps near noise, 1 is even.
    seed: of the first sample, the next ones count up; or one seed a sample. A sample depends on its own seed alone,
    not on the batch it is in. noise: (B, C, ...) instead of seeds.
    sample_size: default the model's own. batch_size: samples at a time, default all.
    progress: called with (samples done, samples in all) after every batch.

    Raises ValueError for what does not fit the model.
    """
    wanted: Condition = model.conditions(y)
    count = len(wanted)
    size = tuple(noise.shape[2:]) if noise is not None else as_size(sample_size or model.config.sample_size)
    model.token_grid(size)
    times, run = time_grid(steps, shift), get_solver(solver)
    plan = sampling_plan(model, times, budget, guidance, solver)
    shape = (model.config.in_channels, *size)
    if noise is not None and noise.shape != (count, *shape):
        raise ValueError(f"noise: shape {tuple(noise.shape)}, expected {(count, *shape)}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give at least 1")
    seeds = sample_seeds(seed, count)

    samples = []
    for first in range(0, count, batch_size or count):
        part = slice(first, first + (batch_size or count))
        x = seeded_noise(seeds[part], shape) if noise is None else noise[part]
        velocity = guided_network(model, wanted[part].to(model.device), plan, guidance)
        with torch.no_grad():
            samples.append(run(velocity, x.to(model.device, torch.float32), times))
        if progress:
            progress(min(part.stop, count), count)
    return torch.cat(samples)


def sampling_plan(
    model: Transformer, times: Sequence[float], budget: Schedule, guidance: Guidance | None, solver: str = "euler"
) -> list[dict[float, list[Branch]]]:
    """For every step, what is evaluated at which time: {t: branches}. Raises ValueError for an invalid budget."""
    plan = []
    for step, kept in enumerate(schedule_budgets(budget, times[:-1], model.budgets)):
        corrected = solver == "heun" and step < len(times) - 2
        at = times[step : step + 2] if corrected else times[step : step + 1]
        plan.append({t: branches(guidance, t, kept, model.budgets) for t in at})
    return plan


def guided_network(
    model: Transformer, y: Condition, plan: Sequence[dict[float, list[Branch]]], guidance: Guidance | None
) -> Callable[[Tensor, float, int], Tensor]:
    """The solver's velocity(x, t, step): all branches in one batch, each at its budget; float32 like x."""
    null = model.without_condition(y)

    def velocity(x: Tensor, t: float, step: int) -> Tensor:
        def evaluate(chosen: Sequence[Branch]) -> Sequence[Tensor]:
            count = len(chosen)
            # float32 times whatever the network's dtype: bfloat16 has 8 bits for them.
            time = torch.full((count * len(x),), t, device=x.device, dtype=torch.float32)
            conditions = concatenate([null if branch.drop_class else y for branch in chosen])
            repeated = x.to(model.dtype).repeat(count, *[1] * (x.ndim - 1))
            v = model(repeated, time, conditions, [branch.budget for branch in chosen])
            return v.to(x.dtype).chunk(count)

        return guided_velocity(evaluate, plan[step][t], guidance.scale if guidance else 1.0)

    return velocity


def sampling_flops(
    model: Transformer,
    *,
    steps: int = 40,
    budget: Schedule = None,
    guidance: Guidance | None = None,
    solver: str = "euler",
    shift: float = 1.0,
    sample_size: int | Sequence[int] | None = None,
) -> int:
    """Floating-point operations of one whole sample, guidance branches included; arguments as in `sample`."""
    plan = sampling_plan(model, time_grid(steps, shift), budget, guidance, solver)
    cost = {kept: count_flops(model, sample_size=sample_size, budget=kept) for kept in model.budgets or (None,)}
    return sum(cost[branch.budget] for step in plan for chosen in step.values() for branch in chosen)


def sample_seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """One seed a sample: counting up from `seed`, or those given."""
    if isinstance(seed, int):
        return list(range(seed, seed + count))
    if len(seed) != count:
        raise ValueError(f"seed: {len(seed)} seeds for {count} samples; give one a sample, or one number")
    return list(seed)


def seeded_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """(B, *shape) standard normal, each sample from its own seed; drawn on the CPU, so equal on every device."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
