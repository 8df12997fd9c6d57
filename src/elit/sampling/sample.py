"""From a network and labels to samples: the solver, the guidance and the budgets of every step, put together."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from elit.arguments import shortened, whole_number
from elit.budgets import Budget, Schedule, budgets_of_samples, equal_parts, one_schedule
from elit.flow.guidance import Branch, Guidance, guided_velocity
from elit.flow.solver import get_solver, time_grid
from elit.models.conditioning import Condition, concatenate
from elit.models.layout import as_size
from elit.models.transformer import Transformer
from elit.sampling.evaluations import Evaluations, sampling_plan, shares_head
from elit.sampling.precision import runner
from elit.sampling.settings import Sampling

OnStep = Callable[[int, float, Tensor], None]
Seed = int | torch.Generator


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
    on_step: OnStep | None = None,
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
    sampling = sampling or plan or Sampling()
    steps = sampling.steps if steps is None else steps
    guidance = sampling.guidance if guidance is None else guidance
    solver = sampling.solver if solver is None else solver
    shift = sampling.shift if shift is None else shift
    cache = sampling.cache if cache is None else cache
    dtype = sampling.dtype if dtype is None else dtype
    if budget is step_budgets is sample_budgets is None:
        budget, sample_budgets = sampling.budget, sampling.sample_budgets or None
        if isinstance(budget, tuple):
            budget, step_budgets = None, budget
    if noise is None:
        seed = sampling.seed if seed is None else seed
    seed = 0 if seed is None else seed
    if noise is not None and (not _is_default(seed) or sample_size is not None):
        name, value = ("sample_size", sample_size) if _is_default(seed) else ("seed", seed)
        raise ValueError(
            f"noise, {name}={shortened(value)}: noise takes the place of seed and sample_size; give one of them"
        )
    if not isinstance(model, Transformer):
        raise ValueError(f"model={shortened(model)}: give a network of this library; elit.load_model(FOLDER) loads one")
    wanted: Condition = model.prepare_condition(y)
    count = len(wanted)
    if noise is not None and not (isinstance(noise, Tensor) and noise.is_floating_point()):
        raise ValueError(f"noise={shortened(noise)}: give a tensor of floating point, (B, C, ...)")
    if on_step is not None and not callable(on_step):
        raise ValueError(f"on_step={shortened(on_step)}: give a function of (step, t, x)")
    if progress is not None and not callable(progress):
        raise ValueError(f"progress={shortened(progress)}: give a function of (samples done, samples in all)")
    size = (
        tuple(noise.shape[2:])
        if noise is not None
        else as_size(model.config.sample_size if sample_size is None else sample_size)
    )
    model.token_grid(size)
    times, run = time_grid(steps, shift), get_solver(solver)
    schedule = one_schedule(budget, step_budgets, sample_budgets)
    evaluations = sampling_plan(model, times, schedule, guidance, solver, cache)
    counts = None
    if sample_budgets is not None:
        counts = mixed_budgets(model, sample_budgets, count, guidance)
    network = runner(model, dtype, compile=compile)
    shape = (model.config.in_channels, *size)
    if noise is not None and noise.shape != (count, *shape):
        raise ValueError(f"noise: shape {tuple(noise.shape)}, expected {(count, *shape)}")
    batch_size = count if batch_size is None else whole_number("batch_size", batch_size, 1)
    seeds = sample_seeds(seed, count)

    samples = []
    for first in range(0, count, batch_size):
        part = slice(first, first + batch_size)
        x = seeded_noise(seeds[part], shape) if noise is None else noise[part]
        rows = wanted[part].to(model.device)
        velocity = guided_network(model, rows, evaluations, guidance, network, counts and counts[part])
        if on_step is not None:
            velocity = watched(velocity, on_step)
        with torch.no_grad():
            samples.append(run(velocity, x.to(model.device, torch.float32), times))
        if progress:
            progress(min(part.stop, count), count)
    return torch.cat(samples)


def guided_network(
    model: Transformer,
    y: Condition,
    plan: Evaluations,
    guidance: Guidance | None,
    network: Callable[..., Tensor] | None = None,
    sample_budgets: Sequence[int | None] | None = None,
) -> Callable[[Tensor, float, int], Tensor]:
    """The solver's velocity(x, t, step): all branches in one batch, each at its budget; float32 like x.

    network: what is called in the place of `model`, see `runner`. sample_budgets: latents of each sample in the main
    branch, in the place of the plan's.
    """
    null, run = model.without_condition(y), network or model
    conditions: dict[tuple[bool, ...], Condition] = {}
    last: Tensor

    def velocity(x: Tensor, t: float, step: int) -> Tensor:
        def evaluate(branches: Sequence[Branch]) -> Sequence[Tensor]:
            shared = shares_head(branches) and sample_budgets is None
            rows = tuple(branch.drop_class for branch in (branches[:1] if shared else branches))
            if rows not in conditions:
                conditions[rows] = concatenate([null if dropped else y for dropped in rows])
            # float32 times whatever the network's dtype: bfloat16 has 8 bits for them.
            time = torch.full((len(rows) * len(x),), t, device=x.device, dtype=torch.float32)
            repeated = x.repeat(len(rows), *[1] * (x.ndim - 1))
            if sample_budgets is None:
                each = [branch.budget for branch in branches]
            else:
                weak = [weak_branch(model, guidance, budget) for budget in sample_budgets] if len(branches) > 1 else []
                each = [*sample_budgets, *weak]
            parts = each if shared else equal_parts(each)
            v = run(repeated, time, conditions[rows], branch_budgets=parts, shared=shared)
            return v.to(x.dtype).chunk(len(branches))

        nonlocal last
        if branches := plan[step][t]:
            last = guided_velocity(evaluate, branches, guidance.scale if guidance else 1.0)
        return last

    return velocity


def weak_branch(model: Transformer, guidance: Guidance | None, num_latents: int | None) -> int | None:
    """The weak branch's budget beside a main branch of `num_latents` latents."""
    return None if guidance is None else guidance.weak_budget(num_latents, model.budgets)


def mixed_budgets(
    model: Transformer, sample_budgets: Sequence[Budget], count: int, guidance: Guidance | None
) -> list[int | None]:
    """One valid budget a sample, each of which goes with the guidance. Raises ValueError."""
    counts = budgets_of_samples(sample_budgets, count, model.budgets, "sample_budgets")
    for each in dict.fromkeys(counts):
        weak_branch(model, guidance, each)
    return counts


def watched(
    velocity: Callable[[Tensor, float, int], Tensor], on_step: OnStep
) -> Callable[[Tensor, float, int], Tensor]:
    """The same velocity, telling `on_step` of the state before every step."""
    last_step = -1

    def watch(x: Tensor, t: float, step: int) -> Tensor:
        nonlocal last_step
        if step != last_step:  # Heun's looks at a step twice
            last_step = step
            on_step(step, t, x)
        return velocity(x, t, step)

    return watch


def sample_seeds(seed: Seed | Sequence[Seed], count: int) -> list[Seed]:
    """One seed a sample: counting up from `seed`, or those given. Raises ValueError."""
    if isinstance(seed, torch.Generator):
        return [seed] * count
    several = seed.tolist() if getattr(seed, "ndim", None) == 1 else seed  # pyrefly: ignore[missing-attribute]
    if isinstance(several, Sequence) and not isinstance(several, str | bytes):
        if len(several) != count:
            raise ValueError(f"seed: {len(several)} seeds for {count} samples; give one a sample, or one number")
        return [each if isinstance(each, torch.Generator) else _seed(each) for each in several]
    first = _seed(seed)
    return [_seed(first + i) for i in range(count)]


def _is_default(seed: Any) -> bool:
    return isinstance(seed, int) and seed == 0


def _seed(value: Any) -> int:
    return whole_number("seed", value, -(1 << 63), (1 << 64) - 1)


def seeded_noise(seeds: Sequence[Seed], shape: Sequence[int]) -> Tensor:
    """(B, *shape) standard normal on the CPU, each sample from its own seed, so equal on every device.

    A generator is drawn from on its own device, once for each sample that names it.
    """
    draws = []
    for seed in seeds:
        source = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        draws.append(torch.randn(*shape, generator=source, device=source.device).cpu())
    return torch.stack(draws)
