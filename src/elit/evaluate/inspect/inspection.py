"""All measurements of `elit inspect` on one network: numbers as JSON, and pictures."""

import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from elit.budgets import evenly_spaced
from elit.config import ModelConfig, TrainConfig
from elit.costs.flops import count_flops
from elit.data.images import LatentSet, posterior_sample
from elit.evaluate.chunks import describe_run
from elit.evaluate.inspect.attention import Probe, as_grid, losses, read_maps
from elit.evaluate.plots import draw_sheet, read_attention, samples_by_budget
from elit.files import Json, write_text
from elit.models.transformer import Transformer
from elit.sampling.autoencoders import decode, downsampling, encode_mean
from elit.sampling.engine import seeded_noise
from elit.sampling.evaluations import sampling_flops
from elit.sampling.sample import sample
from elit.sampling.settings import STEPS, Sampling
from elit.training.train import load_data, load_prompts

MAX_BUDGETS, MAX_SAMPLES, MAX_EXAMPLES = 16, 8, 6
PICTURES = ("attention_and_loss.png", "examples.png", "latents_read.png", "budgets.png")


def load_probe(
    model: Transformer,
    data: str,
    count: int,
    *,
    vae: ModelMixin | None = None,
    image_size: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> Probe:
    """A probe of evenly spaced samples of `data`, as `elit inspect` takes it; settings: of `Probe`."""
    if data == "samples":
        if model.takes_text:
            raise ValueError("data='samples' is not supported for a model that takes text: give data with captions")
        y = torch.arange(count) % model.config.num_classes
        x = sample(model, y, seed=seed).float().cpu()
        classes = model.config.get("class_names") or range(model.config.num_classes)
        origin = {"data": "samples", "steps": STEPS, "seed": seed}
        return Probe(x=x, y=y, seed=seed, names=tuple(str(classes[i]) for i in y.tolist()), origin=origin, **settings)
    # Training opens `data` by its config, which has to name a network with the same kind of condition.
    text = {name: model.config[name] for name in ("text_encoder", "text_length")} if model.takes_text else {}
    network = ModelConfig(name="MM-DiT-S/2" if text else "DiT-S/2", **text)
    size = model.sample_size[-1] * downsampling(vae) if image_size is None else image_size
    config = TrainConfig(data=data, image_size=size, model=network)
    images = load_data(config)
    if count > len(images):
        raise ValueError(f"count must be at most {len(images)}, the size of {data!r}, got {count}")
    rows = [i * len(images) // count for i in range(count)]
    x, labels = images.__getitems__(rows)
    encoded = isinstance(images, LatentSet)
    if encoded:
        x = posterior_sample(x, seeded_noise(range(seed, seed + count), images.shape))
    elif vae is not None and x.shape[1] != 3:
        raise ValueError(f"cannot encode data of {x.shape[1]} channels: an autoencoder takes RGB")
    elif vae is not None:
        x = torch.cat([encode_mean(vae, part).cpu() for part in x.split(8)])
    wanted = (model.config.in_channels, *model.sample_size)
    if x.shape[1:] != wanted:
        hint = "; give vae, the autoencoder that it was trained in" if vae is None and x.shape[1] == 3 else ""
        raise ValueError(f"data={data!r} must have samples of {wanted} for this model, got {tuple(x.shape[1:])}{hint}")
    prompts = load_prompts(config, images, model.device)
    y = model.conditioning.prepare(labels if prompts is None else prompts[labels])
    names = images.classes if prompts is None else images.captions
    origin = {"data": data, "rows": rows, "posterior_seed": seed if encoded else None}
    of_samples = tuple(names[label] for label in labels.tolist())
    return Probe(x=x, y=y, seed=seed, names=of_samples, origin=origin, **settings)


def as_pictures(samples: Tensor, vae: ModelMixin | None) -> Tensor:
    """(B, 1 or 3, H, W) in [-1, 1] on the CPU, a clip's first frame; latents without vae as means over channels."""
    if vae is None and samples.shape[1] not in (1, 3):
        means = samples.float().cpu().mean(1, keepdim=True)
        means = means[:, :, 0] if means.ndim == 5 else means
        low, high = means.amin((1, 2, 3), keepdim=True), means.amax((1, 2, 3), keepdim=True)
        return 2 * (means - low) / (high - low).clamp(min=1e-6) - 1
    device = samples.device if vae is None else vae.device
    with torch.no_grad():  # all latents of a clip: the first frame of some autoencoders needs the later ones
        pictures = torch.cat([decode(vae, part.to(device)) for part in samples.split(8)]).float().cpu()
    return (pictures[:, :, 0] if pictures.ndim == 5 else pictures).clamp(-1, 1)


def inspect_model(
    model: Transformer,
    probe: Probe,
    sampling: Sampling,
    out: Path,
    *,
    vae: ModelMixin | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Json:
    """Measures the network; writes `PICTURES` and inspect.json into `out`, and returns the numbers."""
    settings = {each: replace(sampling, budget=each) for each in evenly_spaced(model.budgets, MAX_BUDGETS)[::-1]}
    # Before the work: some guidance fits no small budget.
    costs = {budget: sampling_flops(model, setting) for budget, setting in settings.items()}
    read = read_maps(model, probe)
    rows = [probe.names.index(name) for name in sorted(set(probe.names))][:MAX_SAMPLES]
    y = probe.y[torch.tensor(rows)]
    measured, samples = dict[int, Tensor](), dict[int, Tensor]()
    for budget in (*model.budgets, *settings):
        if budget not in measured:
            measured[budget] = losses(model, probe, budget)
        else:
            samples[budget] = sample(model, y, settings[budget], batch_size=probe.batch_size).cpu()
        if progress:
            progress(len(measured) + len(samples), len(model.budgets) + len(settings))

    size, full = probe.x.shape[2:], model.budgets[-1]

    def on_grid(tokens: Tensor) -> Tensor:
        grid = as_grid(model, tokens, size)
        return grid[:, :, 0] if grid.ndim == 5 else grid

    attention, loss = (on_grid(part.movedim(0, -1)).movedim(1, 0) for part in (read.attention, read.loss))
    of_samples, in_windows = read.correlation(), read.correlation_in_windows()
    correlations = [
        {
            "t": time,
            "loss": read.loss[i].mean().item(),
            "spearman": _spread(of_samples[i]),
            "in_windows": _spread(in_windows[i]),
        }
        for i, time in enumerate(probe.times)
    ]

    def increase(loss: Tensor) -> Json:
        more = (loss - measured[full]).mean(0)  # (B,): of the same samples, so that only differences spread
        error = more.std().item() / len(more) ** 0.5
        return {"loss": loss.mean().item(), "increase": more.mean().item(), "standard_error": error}

    network = {"folder": str(model.config.get("_name_or_path", "")), "latents": full}
    run = describe_run(model, vae)
    numbers = {
        "made": run
        | {name: getattr(probe, name) for name in ("times", "draws", "seed", "batch_size")}
        | {"model": run["model"] | network, "examples": probe.origin, "sampling": sampling.to_dict()}
        | {"pictures": vae is not None or model.config.in_channels in (1, 3)},
        "attention_and_loss": correlations,
        "budgets": [
            {"latents": budget, "gflops": count_flops(model, sample_size=size, budget=budget) / 1e9} | increase(each)
            for budget, each in measured.items()
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
    write_text(out / "inspect.json", json.dumps(numbers, indent=1, allow_nan=False) + "\n")

    # Both maps at every time, means over samples (paper Figure 2).
    window = model.window(size)[-2:]
    both = [("Read attention,\nsummed over latents", attention.mean(1)), ("flow-matching\nloss", loss.mean(1))]
    times = [f"t = {time:g}" for time in probe.times]
    draw_sheet(both, times, out / "attention_and_loss.png", cell=1.75, margin=2.2, window=window)
    # Single samples at the middle one of the times: picture, Read attention, loss, and their correlation.
    middle, pictures = len(probe.times) // 2, as_pictures(probe.x[:MAX_EXAMPLES], vae)
    count = len(pictures)
    titles = ["no ρ" if value.isnan() else f"ρ = {value:.2f}" for value in of_samples[middle, :count]]
    parts = [("data", pictures), ("attention", attention[middle, :count]), ("loss", loss[middle, :count])]
    draw_sheet(parts, titles, out / "examples.png", cell=1.35, margin=1.3, window=window)
    # The first and the last latents, mean over the times (paper Figure 12).
    latents = on_grid(read.latents[:count])
    slots = sorted({*range(min(3, full)), *range(max(0, full - 3), full)})
    read_attention(pictures, latents, slots, out / "latents_read.png", title="data")
    # The same noise at every budget (paper Figure 16).
    by_budget = [(f"{budget} latent{'s' if budget > 1 else ''}", as_pictures(x, vae)) for budget, x in samples.items()]
    names = ["\n".join(textwrap.wrap(probe.names[row], 11, max_lines=3, placeholder="…")) for row in rows]
    samples_by_budget(by_budget, names, out / "budgets.png")
    return numbers


def _spread(values: Tensor) -> Json:
    values = values[~values.isnan()]
    return {
        "mean": values.mean().item() if len(values) else None,
        "std": values.std().item() if len(values) > 1 else None,
        "count": len(values),
    }


def tables(numbers: Json) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """Titles, headings and rows: the correlations and the loss of every budget, as `elit inspect` prints them."""

    def text(value: float | None) -> str:
        return "–" if value is None else f"{value:+.3f}"

    correlation: list[list[str]] = []
    for row in numbers["attention_and_loss"]:
        spreads = [text(row[kind][part]) for kind in ("spearman", "in_windows") for part in ("mean", "std")]
        correlation.append([f"{row['t']:g}", f"{row['loss']:.4f}", *spreads])
    forms = {"latents": "", "gflops": ".4g", "loss": ".5f", "increase": "+.5f", "standard_error": ".5f"}
    budgets = [[format(row[name], form) for name, form in forms.items()] for row in numbers["budgets"]]
    times = ("t", "loss", "correlation", "std", "inside windows", "std")
    return [
        ("Rank correlation of Read attention and loss", times, correlation),
        ("Loss at every budget", ("latents", "GFLOPs", "loss", "increase", "standard error"), budgets),
    ]
