"""All measurements of `elit inspect` on one network, and the numbers as JSON."""

import json
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
from elit.data.latents import LatentSet, posterior_sample
from elit.evaluate import sheets
from elit.evaluate.inspect.attention import Inspection, Probe, ReadMaps, as_grid, losses, rank_correlation, read_maps
from elit.evaluate.recipe import Recipe, describe_autoencoder, device_name, versions
from elit.evaluate.report.html import Section, write_page
from elit.files import Json, write_text
from elit.models.saved import weights_digest
from elit.models.transformer import Transformer
from elit.sampling.autoencoders import decode, downsampling, encode_mean
from elit.sampling.engine import seeded_noise
from elit.sampling.evaluations import sampling_flops
from elit.sampling.sample import sample
from elit.sampling.settings import Sampling
from elit.training.train import load_data, load_prompts

OWN_STEPS = 20
MAX_BUDGETS, MAX_SAMPLES = 16, 8
PICTURES = {
    "attention_and_loss.png": sheets.attention_and_loss,
    "examples.png": sheets.examples,
    "latents_read.png": sheets.latents_read,
    "budgets.png": sheets.budgets,
}
OLD = ("entropy.png", "latents_matter.png")  # of earlier versions
CORRELATION = ("t", "loss", "correlation", "std", "inside windows", "std", "of the mean maps")


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
    """A probe of a data set by name, a folder of images, or one that `elit encode` wrote; or of "samples", the model's
    own.

    count: samples, evenly spaced over the data. vae: the autoencoder that the network was trained in, to encode
    pictures. image_size: a folder's images are cut to it, default the network's size. seed: of all noise. settings: of
    `Probe`. Raises ValueError where the data is missing, too small, or does not fit the network.
    """
    text = model.takes_text
    if data == "samples":
        if text:
            raise ValueError("data='samples' is not supported for a model that takes text: give data with captions")
        y = torch.arange(count) % model.config.num_classes
        x = sample(model, y, steps=OWN_STEPS, seed=seed).float().cpu()
        classes = model.config.get("class_names") or tuple(map(str, range(model.config.num_classes)))
        origin = {"data": "samples", "steps": OWN_STEPS, "seed": seed}
        return Probe(x=x, y=y, seed=seed, names=tuple(classes[i] for i in y.tolist()), origin=origin, **settings)
    if image_size is None:
        image_size = model.sample_size[-1] * downsampling(vae)
    # Training opens `data` by its config, which has to name a network with the same kind of condition.
    network = ModelConfig(name="DiT-S/2")
    if text:
        encoder = {name: model.config[name] for name in ("text_encoder", "text_length")}
        network = ModelConfig(name="MM-DiT-S/2", **encoder)
    config = TrainConfig(data=data, image_size=image_size, model=network)
    images = load_data(config)
    if count > len(images):
        raise ValueError(f"count must be at most {len(images)}, the size of {data!r}, got {count}")
    rows = [i * len(images) // count for i in range(count)]
    batch, labels = images.__getitems__(rows)
    x = batch
    if isinstance(images, LatentSet):
        x = posterior_sample(batch, seeded_noise(range(seed, seed + count), images.shape))
    elif vae is not None and batch.shape[1] != 3:
        raise ValueError(f"cannot encode data of {batch.shape[1]} channels: an autoencoder takes RGB")
    elif vae is not None:
        x = torch.cat([encode_mean(vae, part).cpu() for part in batch.split(8)])
    wanted = (model.config.in_channels, *model.sample_size)
    if x.shape[1:] != wanted:
        hint = "; give vae, the autoencoder that it was trained in" if vae is None and x.shape[1] == 3 else ""
        raise ValueError(f"data={data!r} must have samples of {wanted} for this model, got {tuple(x.shape[1:])}{hint}")
    prompts = load_prompts(config, images, model.device)
    y = model.prepare_condition(labels if prompts is None else prompts[labels])
    names = images.classes if prompts is None else images.captions
    origin = {"data": data, "rows": rows, "posterior_seed": seed if isinstance(images, LatentSet) else None}
    of_samples = tuple(names[label] for label in labels.tolist())
    return Probe(x=x, y=y, seed=seed, names=of_samples, origin=origin, **settings)


def as_pictures(samples: Tensor, vae: ModelMixin | None) -> Tensor:
    """Samples of a network as pictures (B, 1 or 3, H, W) in [-1, 1] on the CPU, of clips the first frame.

    Latents without their autoencoder become the mean over their channels, each scaled to its own range.
    """
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
    *,
    vae: ModelMixin | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Measures the network on a probe, and samples with the same seeds at every budget.

    sampling: its budget is not used. vae: to decode pictures. progress: called with (measurements done, in all).
    Raises ValueError for a baseline.
    """
    budgets = evenly_spaced(model.budgets, MAX_BUDGETS)[::-1]
    measured: dict[int, Tensor] = {}
    # Before the work: some guidance fits no small budget.
    costs = {budget: sampling_flops(model, replace(sampling, budget=budget)) for budget in budgets}
    read = read_maps(model, probe)
    rows = [probe.names.index(name) for name in sorted(set(probe.names))][:MAX_SAMPLES]
    y = probe.y[torch.tensor(rows)]
    samples = {}
    for done, budget in enumerate([*model.budgets, *budgets]):
        if budget not in measured:
            measured[budget] = losses(model, probe, budget)
        else:
            samples[budget] = sample(model, y, replace(sampling, budget=budget), batch_size=probe.batch_size).cpu()
        if progress:
            progress(done + 1, len(model.budgets) + len(budgets))

    size, full = probe.x.shape[2:], model.budgets[-1]
    maps = {"latents": _first_frame(as_grid(model, read.latents, size))}
    for name in ("attention", "loss"):
        maps[name] = _first_frame(as_grid(model, getattr(read, name).movedim(0, -1), size)).movedim(1, 0)
    numbers = {
        "made": describe_run(model, probe, sampling, vae),
        "attention_and_loss": _attention_and_loss(read, probe.times),
        "maps": {name: maps[name].mean(1).tolist() for name in ("attention", "loss")},
        "budgets": [
            {"latents": budget, "gflops": count_flops(model, sample_size=size, budget=budget) / 1e9}
            | _increase(loss, measured[full])
            for budget, loss in measured.items()
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
        names=probe.names,
        samples={budget: as_pictures(x, vae) for budget, x in samples.items()},
        sampled=tuple(probe.names[row] for row in rows),
        numbers=numbers,
        sampling=sampling,
    )


def describe_run(model: Transformer, probe: Probe, sampling: Sampling, vae: ModelMixin | None) -> Recipe:
    """Everything that decides the numbers, as JSON."""
    network = {"class": type(model).__name__, "weights": weights_digest(model), "latents": model.budgets[-1]}
    return {
        "model": {"folder": str(model.config.get("_name_or_path", ""))} | network,
        "examples": probe.origin,
        **{name: getattr(probe, name) for name in ("times", "draws", "seed", "batch_size")},
        "sampling": sampling.to_dict(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(model.device),
        "autoencoder": describe_autoencoder(vae),
        "pictures": vae is not None or model.config.in_channels in (1, 3),
        "versions": versions(),
    }


def _attention_and_loss(read: ReadMaps, times: Sequence[float]) -> list[Json]:
    """A row a time; spearman and in_windows over samples, of_means of the maps averaged over samples."""
    of_samples, in_windows = read.correlation(), read.correlation_in_windows()
    of_means = rank_correlation(read.attention.mean(1), read.loss.mean(1))
    return [
        {
            "t": time,
            "loss": read.loss[i].mean().item(),
            "spearman": _spread(of_samples[i]),
            "in_windows": _spread(in_windows[i]),
            "of_means": None if of_means[i].isnan() else of_means[i].item(),
        }
        for i, time in enumerate(times)
    ]


def _increase(loss: Tensor, full: Tensor) -> Json:
    """The loss (T, B), and its difference to `full`."""
    increase = (loss - full).mean(0)  # (B,): of the same samples, so that only differences spread
    return {
        "loss": loss.mean().item(),
        "increase": increase.mean().item(),
        "standard_error": increase.std().item() / len(increase) ** 0.5,
    }


def _spread(values: Tensor) -> Json:
    """Mean and standard deviation of the defined values, and their number."""
    values = values[~values.isnan()]
    return {
        "mean": values.mean().item() if len(values) else None,
        "std": values.std().item() if len(values) > 1 else None,
        "count": len(values),
    }


def _first_frame(maps: Tensor) -> Tensor:
    """(B, k, rows, columns) of images as they are, of clips (B, k, frames, rows, columns) the first frame."""
    return maps[:, :, 0] if maps.ndim == 5 else maps


def is_inspection(name: str) -> bool:
    """A file of that name is one of those that `write_inspection` writes."""
    return name in (*PICTURES, *OLD, "inspect.json", "report.html")


def write_inspection(inspection: Inspection, out: Path, title: str) -> None:
    """Writes the pictures, inspect.json and report.html into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        draw(inspection, out / name)
    numbers = inspection.numbers
    write_text(out / "inspect.json", json.dumps(numbers, indent=1, allow_nan=False) + "\n")
    made, rows = numbers["made"], numbers["attention_and_loss"]
    times = ", ".join(f"{time:g}" for time in made["times"])
    frames = inspection.read.loss.shape[2] > inspection.maps["loss"][0, 0].numel()
    lead = (
        f"{len(inspection.names)} samples of {made['examples']['data']}, with {made['draws']} draws of noise each at "
        f"t = {times} (0 = noise, 1 = data). The noise is the same in every measurement. All numbers and their "
        f"settings are in inspect.json.{' Of clips the first frame is shown.' if frames else ''}"
    )
    sections = [
        Section(
            title="Read's attention and the loss",
            text="A latent's weights sum to 1 over its window, so their sum over latents compares tokens inside a "
            "window, while every window gets the same total. White lines are windows. The rank correlation "
            "(Spearman's) is of single samples; below 0, tokens of high loss are read less.",
            image=out / "attention_and_loss.png",
            headings=CORRELATION,
            rows=[correlation_cells(row) for row in rows],
        ),
        Section(
            title="Single samples",
            text=f"At t = {rows[len(rows) // 2]['t']:g}, mean over draws of noise; ρ is their rank correlation.",
            image=out / "examples.png",
        ),
        Section(
            title="The first and the last latents",
            text="Mean over all times and draws. Each window has its own copy of a latent.",
            image=out / "latents_read.png",
        ),
        Section(
            title="The loss of every budget",
            text="Latents kept of every group, the cost of one forward, and the standard error of the increase.",
            headings=("latents", "GFLOPs", "loss", "increase", "standard error"),
            rows=[
                (
                    *(str(row["latents"]), f"{row['gflops']:.4g}", f"{row['loss']:.5f}"),
                    *(f"{row['increase']:+.5f}", f"{row['standard_error']:.5f}"),
                )
                for row in numbers["budgets"]
            ],
        ),
        Section(
            title="The same noise at every budget",
            text=f"{inspection.sampling.describe()}. Only the number of latents changes from row to row."
            + ("" if made["pictures"] else " Not pictures: the mean over the channels of latents."),
            image=out / "budgets.png",
        ),
    ]
    write_page(out / "report.html", f"Inside {title}", lead, sections)


def correlation_cells(row: Json) -> list[str]:
    """The columns of `CORRELATION`, of a row of inspect.json's attention_and_loss."""
    spreads = [_text(row[kind][part]) for kind in ("spearman", "in_windows") for part in ("mean", "std")]
    return [f"{row['t']:g}", f"{row['loss']:.4f}", *spreads, _text(row["of_means"])]


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"
