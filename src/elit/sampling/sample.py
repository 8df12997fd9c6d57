"""`elit.sample`: from a network and labels to samples."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from elit.budgets import Budget, Schedule
from elit.config import require
from elit.flow.guidance import Guidance
from elit.models.conditioning import Condition
from elit.models.transformer import Transformer
from elit.models.windows import as_size
from elit.sampling.engine import NetworkEngine, Seed, seeded_noise
from elit.sampling.settings import Sampling, make_sampling


def sample(
    model: Transformer,
    y: Condition | Sequence[int] | int | Sequence[str] | str,
    sampling: Sampling | None = None,
    *,
    steps: int | None = None,
    budget: Schedule = None,
    step_budgets: Sequence[Budget] | None = None,
    sample_budgets: Sequence[Budget] | None = None,
    guidance: Guidance | None = None,
    solver: str | None = None,
    seed: Seed | Sequence[Seed] | None = None,
    shift: float | None = None,
    sample_size: int | Sequence[int] | None = None,
    noise: Tensor | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache: float | None = None,
    dtype: torch.dtype | str | None = None,
    compile: bool = False,
    plan: Sampling | None = None,
    on_step: Callable[[int, float, Tensor], None] | None = None,
) -> Tensor:
    """Samples (B, C, H, W) or (B, C, T, H, W), float32 on the model's device; pixels in [-1, 1] or autoencoder cells.

    y: B labels, num_classes = no class; for a text-conditional network B prompts or their embeddings.
    sampling: all settings of the run at once (elit.Sampling); those that are given by name take the place of its own.
    steps: default 40 as in the paper, with "euler"; "heun" evaluates twice a step.
    budget: one for all steps, or a schedule: a function of t, or text such as "50%@0-0.5,100%@0.5-1".
    step_budgets: in its place, one budget a step. sample_budgets: in its place, one budget a sample; head and tail of
    the network run for the whole batch together.
    guidance: elit.CFG, elit.AG or elit.CCFG. shift: more of the steps near noise, 1 is even.
    seed: of the first sample, the next ones count up; or one seed a sample. A sample depends on its own seed alone,
    not on the batch it is in. A torch.Generator, for all or one a sample, goes on from where it is.
    noise: (B, C, ...) in the place of seed and sample_size.
    sample_size: default the model's own. batch_size: samples at a time, default all.
    progress: called with (samples done, samples in all) after every batch.
    cache: threshold of TeaCache's rule: while the time embedding has moved by less, relatively, since the last
    evaluation, a step reuses its velocity. 0 is off.
    dtype: of the network, such as "bfloat16", default as it is; the solver's state stays float32. Another one makes a
    copy of the weights, which later calls use again. compile: the whole network by torch.compile, on a GPU with a CUDA
    graph a budget.
    plan: of `elit.plan`, the same as `sampling`.
    on_step: called as on_step(step, t, x) before every step of every batch, with the state (B, C, ...) at time t; what
    it raises ends the run.

    Raises ValueError for what does not fit the model, and for what is given twice.
    """
    changes = {"steps": steps, "guidance": guidance, "solver": solver, "shift": shift, "cache": cache, "dtype": dtype}
    budgets = {"budget": budget, "step_budgets": step_budgets, "sample_budgets": sample_budgets}
    sampling = make_sampling(sampling or plan or Sampling(), **budgets, **changes)
    if noise is not None and (seed not in (None, 0) or sample_size is not None):
        raise ValueError("cannot take noise with seed or sample_size, whose place it takes: give one of them")
    conditions: Condition = model.conditioning.prepare(y)
    count, of_samples = len(conditions), sampling.sample_budgets
    require(len(of_samples) in (0, count), "sample_budgets", len(of_samples), f"{count}, one a sample")
    size = as_size(model.config.sample_size if sample_size is None else sample_size)
    shape = (model.config.in_channels, *(size if noise is None else noise.shape[2:]))
    model.token_grid(shape[1:])
    if noise is not None:
        require(noise.shape == (count, *shape), "noise", tuple(noise.shape), f"of shape {(count, *shape)}")
    seed = sampling.seed if seed is None else seed
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else seed
    seeds = [seeds] * count if isinstance(seeds, torch.Generator) else list(seeds)
    require(len(seeds) == count, "seeds", len(seeds), f"1, or {count}, one a sample")
    batch_size = count if batch_size is None else batch_size
    require(batch_size >= 1, "batch_size", batch_size, "at least 1")

    engine, samples = NetworkEngine(model, compile=compile), []
    for first in range(0, count, batch_size):
        part = slice(first, first + batch_size)
        x = seeded_noise(seeds[part], shape) if noise is None else noise[part]
        run = engine.begin(conditions[part], (), replace(sampling, sample_budgets=of_samples[part]), noise=x)
        while not run.done:
            if on_step is not None:
                on_step(run.steps_done, run.t, run.x)
            run.step()
        samples.append(run.x)
        if progress:
            progress(min(part.stop, count), count)
    return torch.cat(samples)
