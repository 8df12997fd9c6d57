"""All that `elit inspect` measures of one network, and the numbers as JSON."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from elit.costs.flops import count_flops
from elit.evaluate.inspect.attention import as_grid
from elit.evaluate.inspect.examples import Examples, as_pictures
from elit.evaluate.inspect.probe import Look, Probe, look, losses, losses_without, rank_correlation, single_drops
from elit.evaluate.recipe import describe_autoencoder, device_name, versions
from elit.models.saved import weights_digest
from elit.models.transformer import Transformer
from elit.sampling.evaluations import sampling_flops
from elit.sampling.sample import sample
from elit.sampling.settings import Sampling

MOST_BUDGETS, MOST_SAMPLES = 16, 8
HOW = {
    "attention_and_loss": "Spearman's rank correlation, over the tokens of a sample, of Read attention summed over "
    "latents (mean over heads) and the squared error of the velocity; both means over draws of noise. A latent's "
    "weights sum to 1 over its window, so attention cannot move between windows: in_windows ranks inside each window. "
    "of_means: of the two maps averaged over samples. maps: those averages, first axis t; of clips the first frame. "
    "std over samples.",
    "latents": "Entropy in nats of what a latent reads of its window (mean over heads): 0 is one token, the most all "
    "alike. Mean over windows, draws and times; std over samples.",
    "without": "Flow-matching loss with the latents named gone from every group, the others in their places. increase: "
    "over the loss with all, mean over samples, draws and times; standard_error of that mean over samples.",
    "budgets": "Flow-matching loss with the first latents of every group alone; increase and standard_error likewise.",
    "samples": "The same noise at every budget. rms_to_full: root mean square difference to all latents' samples.",
}


@dataclass(frozen=True)
class Inspection:
    """What a network was found to do; T times, B samples, S sampled at each budget."""

    look: Look
    maps: dict[str, Tensor]
    """attention (T, B, rows, columns), loss likewise, latents (B, J, rows, columns): of clips the first frame."""
    window: tuple[int, ...]
    """Rows and columns of a group in them."""
    pictures: Tensor
    """(B, 1 or 3, H, W) in [-1, 1], the data looked at."""
    names: tuple[str, ...]
    """What they are of."""
    by_budget: dict[int, Tensor]
    """Loss (T, B) at every budget, ascending."""
    without: list[tuple[list[int], Tensor]]
    """Slots dropped, and the loss (T, B) without them."""
    samples: dict[int, Tensor]
    """Samples as pictures (S, 1 or 3, H, W) at the budgets shown, descending."""
    sampled: tuple[str, ...]
    """What those are of."""
    numbers: dict[str, Any]
    """The content of inspect.json."""


def inspect_model(
    model: Transformer,
    examples: Examples,
    probe: Probe,
    setting: Sampling,
    *,
    vae: ModelMixin | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Looks at `examples` through `probe` (its x and y are theirs) and samples with `setting` at every budget.

    setting: its budget is not used; the same seeds at every budget. vae: to show pictures. progress: called with
    (forwards and sampled budgets done, in all). Raises ValueError for a baseline.
    """
    drops, budgets = single_drops(model), budgets_shown(model.budgets)
    done, total = 0, probe.forwards * (1 + len(model.budgets) + len(drops)) + len(budgets)

    def tick() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    # Before the work: some guidance fits no small budget.
    costs = {
        budget: sampling_flops(model, steps=setting.steps, budget=budget, guidance=setting.guidance)
        for budget in budgets
    }
    seen = look(model, probe, tick=tick)
    by_budget = {budget: losses(model, probe, budget, tick) for budget in model.budgets}
    without = [(slots, losses_without(model, probe, slots, tick)) for slots in drops]
    rows = [examples.names.index(name) for name in sorted(set(examples.names))][:MOST_SAMPLES]
    y = probe.y[torch.tensor(rows)]
    drawn = {}
    for budget in budgets:
        drawn[budget] = sample(model, y, replace(setting, budget=budget), batch_size=probe.batch_size).cpu()
        tick()

    size = probe.x.shape[2:]
    maps = {
        name: _first_frame(as_grid(model, getattr(seen, name).movedim(0, -1), size)) for name in ("attention", "loss")
    }
    maps = {name: value.movedim(1, 0) for name, value in maps.items()}
    maps["latents"] = _first_frame(as_grid(model, seen.latents, size))
    numbers = {
        "made": describe_run(model, examples, probe, setting, vae),
        "how": HOW,
        "attention_and_loss": _attention_and_loss(seen, probe.times),
        "maps": {name: maps[name].mean(1).tolist() for name in ("attention", "loss")},
        "latents": _latents(seen),
        "without": [
            {"latents": [slot + 1 for slot in slots]} | _increase(loss, by_budget[model.budgets[-1]])
            for slots, loss in without
        ],
        "budgets": [
            {"latents": budget, "gflops": count_flops(model, sample_size=size, budget=budget) / 1e9}
            | _increase(loss, by_budget[model.budgets[-1]])
            for budget, loss in by_budget.items()
        ],
        "samples": [
            {
                "latents": budget,
                "gflops": costs[budget] / 1e9,
                "rms_to_full": (x - drawn[model.budgets[-1]]).square().mean().sqrt().item(),
            }
            for budget, x in drawn.items()
        ],
    }
    return Inspection(
        look=seen,
        maps=maps,
        window=model.window(size)[-2:],
        pictures=as_pictures(probe.x, vae),
        names=examples.names,
        by_budget=by_budget,
        without=without,
        samples={budget: as_pictures(x, vae) for budget, x in drawn.items()},
        sampled=tuple(examples.names[row] for row in rows),
        numbers=numbers,
    )


def budgets_shown(budgets: Sequence[int], most: int = MOST_BUDGETS) -> list[int]:
    """All budgets, or `most` of them evenly spaced, first and last included; descending."""
    if len(budgets) <= most:
        return list(reversed(budgets))
    return [budgets[round(i * (len(budgets) - 1) / (most - 1))] for i in reversed(range(most))]


def describe_run(
    model: Transformer, examples: Examples, probe: Probe, setting: Sampling, vae: ModelMixin | None
) -> dict[str, Any]:
    """Everything that decides the numbers, as JSON."""
    guidance = None if setting.guidance is None else dict(vars(setting.guidance))
    network = {"class": type(model).__name__, "weights": weights_digest(model), "latents": model.budgets[-1]}
    return {
        "model": {"folder": str(model.config.get("_name_or_path", ""))} | network,
        "examples": examples.origin,
        "times": list(probe.times),
        "draws": probe.draws,
        "seed": probe.seed,
        "batch_size": probe.batch_size,
        "sampling": {"steps": setting.steps, "solver": setting.solver, "shift": setting.shift, "guidance": guidance},
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(model.device),
        "autoencoder": describe_autoencoder(vae),
        "pictures": vae is not None or model.config.in_channels in (1, 3),
        "versions": versions(),
    }


def _attention_and_loss(seen: Look, times: Sequence[float]) -> list[dict[str, Any]]:
    """A row a time."""
    of_samples, in_windows = seen.correlation(), seen.correlation_in_windows()
    of_means = rank_correlation(seen.attention.mean(1), seen.loss.mean(1))
    return [
        {
            "t": time,
            "loss": seen.loss[i].mean().item(),
            "spearman": _spread(of_samples[i]),
            "in_windows": _spread(in_windows[i]),
            "of_means": _number(of_means[i]),
            "each": [_number(value) for value in of_samples[i]],
            "each_in_windows": [_number(value) for value in in_windows[i]],
        }
        for i, time in enumerate(times)
    ]


def _latents(seen: Look) -> list[dict[str, Any]]:
    """A row a latent."""
    entropy = seen.entropy.mean(0)  # (B, J)
    return [
        {
            "latent": j + 1,
            "entropy": entropy[:, j].mean().item(),
            "std": entropy[:, j].std().item(),
            "most": math.log(seen.tokens_per_group),
            "by_t": seen.entropy[:, :, j].mean(1).tolist(),
        }
        for j in range(entropy.shape[1])
    ]


def _increase(loss: Tensor, full: Tensor) -> dict[str, Any]:
    """The loss (T, B), and by how much it is more than `full`."""
    increase = (loss - full).mean(0)  # (B,): the samples are the same, so are their differences what spreads
    return {
        "loss": loss.mean().item(),
        "increase": increase.mean().item(),
        "standard_error": increase.std().item() / len(increase) ** 0.5,
        "increase_by_t": (loss - full).mean(1).tolist(),
    }


def _spread(values: Tensor) -> dict[str, Any]:
    """Mean and standard deviation of those that are defined, and how many these are."""
    values = values[~values.isnan()]
    return {
        "mean": values.mean().item() if len(values) else None,
        "std": values.std().item() if len(values) > 1 else None,
        "count": len(values),
    }


def _number(value: Tensor) -> float | None:
    """JSON knows no NaN."""
    return None if value.isnan() else value.item()


def _first_frame(maps: Tensor) -> Tensor:
    """(B, k, rows, columns) of images as they are, of clips (B, k, frames, rows, columns) the first frame."""
    return maps[:, :, 0] if maps.ndim == 5 else maps
