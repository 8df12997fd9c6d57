"""Evaluations of a sampling run: the branches of every step, the steps that reuse the last output, and the cost."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from elit.budgets import schedule_budgets
from elit.config import require
from elit.costs.flops import count_flops, shared_flops
from elit.flow.guidance import Branch, branches
from elit.flow.solver import time_grid
from elit.models.transformer import Transformer
from elit.sampling.settings import Sampling, make_sampling

Evaluations = list[dict[float, list[Branch]]]  # by step and time; a time without branches reuses the last velocity


def sampling_plan(model: Transformer, sampling: Sampling, times: Sequence[float] | None = None) -> Evaluations:
    """The evaluations of all steps, between `times` if given. Raises ValueError for what does not fit the model."""
    guidance, cache = sampling.guidance, sampling.cache
    times = time_grid(sampling.steps, sampling.shift) if times is None else times
    if cache and sampling.solver != "euler":
        raise ValueError(f"cache={cache} is not supported for {sampling.solver!r}, which evaluates a step twice")
    plan: Evaluations = []
    for step, num_latents in enumerate(schedule_budgets(sampling.budget, times[:-1], model.budgets)):
        corrected = sampling.solver == "heun" and step < len(times) - 2
        at = times[step : step + 2] if corrected else times[step : step + 1]
        plan.append({t: branches(guidance, t, num_latents, model.budgets) for t in at})
    if guidance is not None and guidance.scale != 1:
        guided = [pair for step in plan for pair in step.values() if len(pair) > 1]
        steps = ", ".join(f"{t:.3g}" for t in times[:4])
        require(bool(guided), "guidance interval", guidance.interval, f"around the t of a step, one of {steps}, …")
        weak = guided[0][1].budget
        changes = any(main != weak for main, weak in guided)
        require(changes, "guidance_budget", weak, f"below the main branch's for {guidance.kind}")
    if cache:
        counts = [len(branches_at) for step in plan for branches_at in step.values()]
        for step, again in enumerate(reused_steps(time_changes(model, times[:-1]), counts, cache)):
            if again:
                plan[step] = {times[step]: []}
    return plan


@torch.no_grad()
def time_changes(model: Transformer, times: Sequence[float]) -> list[float]:
    """Relative L1 change of the time embedding from each of `times` to the next, len(times) - 1 numbers."""
    t = torch.tensor(times, device=model.device, dtype=torch.float32)
    at = model.conditioning.time(t, model.dtype).float()
    return ((at[1:] - at[:-1]).abs().mean(1) / at[:-1].abs().mean(1)).tolist()


def reused_steps(changes: Sequence[float], counts: Sequence[int], threshold: float) -> list[bool]:
    """TeaCache's rule: steps reuse the output while changes sum up below the threshold, but at ends and turns."""
    reused, total = [False], 0.0
    for step, change in enumerate(changes, start=1):
        total += change
        again = total < threshold and counts[step] == counts[step - 1] and step < len(counts) - 1
        total = total if again else 0.0
        reused.append(again)
    return reused


def shares_head(branches: Sequence[Branch]) -> bool:
    """True for branches that are the same before Read: those of autoguidance."""
    return len(branches) == 2 and branches[0].drop_class == branches[1].drop_class


def sampling_flops(
    model: Transformer,
    sampling: Sampling | None = None,
    *,
    sample_size: int | Sequence[int] | None = None,
    **settings: Any,
) -> int:
    """FLOPs of one whole sample with guidance; settings as in `elit.sample`. Of budgets a sample, the mean."""
    sampling = make_sampling(sampling or Sampling(), **settings)
    if sampling.sample_budgets:
        guidance = sampling.guidance and replace(sampling.guidance, drop_class=True)  # no shared head
        each = [replace(sampling, budget=b, sample_budgets=(), guidance=guidance) for b in sampling.sample_budgets]
        return round(statistics.mean(sampling_flops(model, one, sample_size=sample_size) for one in each))
    every = [branches_at for step in sampling_plan(model, sampling) for branches_at in step.values()]
    runs = Counter(branch.budget for branches_at in every for branch in branches_at)
    cost = sum(count * count_flops(model, sample_size=sample_size, budget=budget) for budget, count in runs.items())
    return cost - sum(map(shares_head, every)) * shared_flops(model, sample_size=sample_size)
