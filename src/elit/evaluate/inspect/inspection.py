"""All measurements of `elit inspect` on one network, and the numbers as JSON."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from elit.budgets import evenly_spaced
from elit.costs.flops import count_flops
from elit.evaluate.inspect.attention import as_grid
from elit.evaluate.inspect.examples import Examples, as_pictures
from elit.evaluate.inspect.probe import Probe, ReadMaps, losses, rank_correlation, read_maps
from elit.evaluate.recipe import Recipe, describe_autoencoder, device_name, versions
from elit.models.saved import weights_digest
from elit.models.transformer import Transformer
from elit.sampling.evaluations import sampling_flops
from elit.sampling.sample import sample
from elit.sampling.settings import Sampling

MAX_BUDGETS, MAX_SAMPLES = 16, 8
HOW = {
    "attention_and_loss": "Spearman's rank correlation, over the tokens of a sample, of Read attention summed over "
    "latents (mean over heads) and the squared error of the velocity; both means over draws of noise. A latent's "
    "weights sum to 1 over its window, so attention cannot move between windows: in_windows ranks inside each window. "
    "of_means: of the two maps averaged over samples. maps: those averages, first axis t; of clips the first frame. "
    "std over samples.",
    "budgets": "Flow-matching loss with the first latents of every group alone; increase: over the loss with all, mean "
    "over samples, draws and times; standard_error of that mean over samples.",
    "samples": "The same noise at every budget. rms_to_full: root mean square difference to all latents' samples.",
}


@dataclass(frozen=True)
class Inspection:
    """Measurements of a network; T times, B samples, S sampled at each budget."""

    read: ReadMaps
    maps: dict[str, Tensor]
    """attention (T, B, rows, columns), loss likewise, latents (B, J, rows, columns): of clips the first frame."""
    window: tuple[int, ...]
    """Rows and columns of a group in them."""
    pictures: Tensor
    """(B, 1 or 3, H, W) in [-1, 1], the data."""
    names: tuple[str, ...]
    """Classes or captions of the data."""
    samples: dict[int, Tensor]
    """Samples as pictures (S, 1 or 3, H, W) at the budgets shown, descending."""
    sampled: tuple[str, ...]
    """Classes or captions of the samples."""
    numbers: dict[str, Any]
    """The content of inspect.json."""


def inspect_model(
    model: Transformer,
    examples: Examples,
    probe: Probe,
    sampling: Sampling,
    *,
    vae: ModelMixin | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Measures `examples` through `probe`, which has their x and y, and samples with the same seeds at every budget.

    sampling: its budget is not used. vae: to decode pictures. progress: called with (forwards and sampled budgets done,
    in all). Raises ValueError for a baseline.
    """
    budgets = evenly_spaced(model.budgets, MAX_BUDGETS)[::-1]
    done, total = 0, probe.forwards * (1 + len(model.budgets)) + len(budgets)

    def tick() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    # Before the work: some guidance fits no small budget.
    costs = {budget: sampling_flops(model, replace(sampling, budget=budget)) for budget in budgets}
    read = read_maps(model, probe, tick=tick)
    by_budget = {budget: losses(model, probe, budget, tick) for budget in model.budgets}
    rows = [examples.names.index(name) for name in sorted(set(examples.names))][:MAX_SAMPLES]
    y = probe.y[torch.tensor(rows)]
    samples = {}
    for budget in budgets:
        samples[budget] = sample(model, y, replace(sampling, budget=budget), batch_size=probe.batch_size).cpu()
        tick()

    size, full = probe.x.shape[2:], model.budgets[-1]
    maps = {"latents": _first_frame(as_grid(model, read.latents, size))}
    for name in ("attention", "loss"):
        maps[name] = _first_frame(as_grid(model, getattr(read, name).movedim(0, -1), size)).movedim(1, 0)
    numbers = {
        "made": describe_run(model, examples, probe, sampling, vae),
        "how": HOW,
        "attention_and_loss": _attention_and_loss(read, probe.times),
        "maps": {name: maps[name].mean(1).tolist() for name in ("attention", "loss")},
        "budgets": [
            {"latents": budget, "gflops": count_flops(model, sample_size=size, budget=budget) / 1e9}
            | _increase(loss, by_budget[full])
            for budget, loss in by_budget.items()
        ],
        "samples": [
            {
                "latents": budget,
                "gflops": costs[budget] / 1e9,
                "rms_to_full": (x - samples[full]).square().mean().sqrt().item(),
            }
            for budget, x in samples.items()
        ],
    }
    return Inspection(
        read=read,
        maps=maps,
        window=model.window(size)[-2:],
        pictures=as_pictures(probe.x, vae),
        names=examples.names,
        samples={budget: as_pictures(x, vae) for budget, x in samples.items()},
        sampled=tuple(examples.names[row] for row in rows),
        numbers=numbers,
    )


def describe_run(
    model: Transformer, examples: Examples, probe: Probe, sampling: Sampling, vae: ModelMixin | None
) -> Recipe:
    """Everything that decides the numbers, as JSON."""
    guidance = None if sampling.guidance is None else dict(vars(sampling.guidance))
    network = {"class": type(model).__name__, "weights": weights_digest(model), "latents": model.budgets[-1]}
    return {
        "model": {"folder": str(model.config.get("_name_or_path", ""))} | network,
        "examples": examples.origin,
        "times": list(probe.times),
        "draws": probe.draws,
        "seed": probe.seed,
        "batch_size": probe.batch_size,
        "sampling": {"steps": sampling.steps, "solver": sampling.solver, "shift": sampling.shift, "guidance": guidance},
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(model.device),
        "autoencoder": describe_autoencoder(vae),
        "pictures": vae is not None or model.config.in_channels in (1, 3),
        "versions": versions(),
    }


def _attention_and_loss(read: ReadMaps, times: Sequence[float]) -> list[dict[str, Any]]:
    """A row a time."""
    of_samples, in_windows = read.correlation(), read.correlation_in_windows()
    of_means = rank_correlation(read.attention.mean(1), read.loss.mean(1))
    return [
        {
            "t": time,
            "loss": read.loss[i].mean().item(),
            "spearman": _spread(of_samples[i]),
            "in_windows": _spread(in_windows[i]),
            "of_means": _number(of_means[i]),
            "each": [_number(value) for value in of_samples[i]],
            "each_in_windows": [_number(value) for value in in_windows[i]],
        }
        for i, time in enumerate(times)
    ]


def _increase(loss: Tensor, full: Tensor) -> dict[str, Any]:
    """The loss (T, B), and its difference to `full`."""
    increase = (loss - full).mean(0)  # (B,): of the same samples, so that only differences spread
    return {
        "loss": loss.mean().item(),
        "increase": increase.mean().item(),
        "standard_error": increase.std().item() / len(increase) ** 0.5,
        "increase_by_t": (loss - full).mean(1).tolist(),
    }


def _spread(values: Tensor) -> dict[str, Any]:
    """Mean and standard deviation of the defined values, and their number."""
    values = values[~values.isnan()]
    return {
        "mean": values.mean().item() if len(values) else None,
        "std": values.std().item() if len(values) > 1 else None,
        "count": len(values),
    }


def _number(value: Tensor) -> float | None:
    """JSON has no NaN."""
    return None if value.isnan() else value.item()


def _first_frame(maps: Tensor) -> Tensor:
    """(B, k, rows, columns) of images as they are, of clips (B, k, frames, rows, columns) the first frame."""
    return maps[:, :, 0] if maps.ndim == 5 else maps
