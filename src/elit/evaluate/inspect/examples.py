"""Data to look at a network with: samples as it takes them, what they are of, and how they look."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from elit.arguments import shortened, whole_number
from elit.config import ModelConfig, TrainConfig
from elit.data.images import ImageData
from elit.data.latents import LatentSet, posterior_sample
from elit.files import existing
from elit.models.conditioning import Condition
from elit.models.transformer import Transformer
from elit.sampling.autoencoders import decode, downsampling, encode_mean
from elit.sampling.sample import sample, seeded_noise
from elit.training.train import load_data, load_prompts

OWN_STEPS = 20


@dataclass(frozen=True)
class Examples:
    """Some of a data set, evenly spaced over it."""

    x: Tensor
    """(B, C, ...) float32 on the CPU, as the network takes them."""
    y: Condition
    """What they are of, B rows on the CPU."""
    names: tuple[str, ...]
    """Class or caption of each."""
    origin: dict[str, Any]
    """Where they come from, as JSON."""


def load_examples(
    model: Transformer,
    data: str,
    count: int,
    *,
    vae: ModelMixin | None = None,
    image_size: int | None = None,
    seed: int = 0,
) -> Examples:
    """`count` samples of a data set by name, a folder of images, or one that `elit encode` wrote; or "samples", the
    model's own.

    vae: the autoencoder that the network was trained in, through which pictures go. image_size: to which a folder's
    images are cut, default what the network takes. seed: of the draw from each latent's posterior.
    Raises ValueError where the data is not there, too few, or not what the network takes.
    """
    if not isinstance(model, Transformer):
        raise TypeError(f"model: a {type(model).__name__}; give a network of elit")
    if not isinstance(data, str):
        raise TypeError(f"data={shortened(data)}: give the name of a data set, or a folder")
    existing(data, "data")
    if vae is not None and not isinstance(vae, ModelMixin):
        raise TypeError(f"vae: a {type(vae).__name__}; give an autoencoder of diffusers")
    count = whole_number("count", count, 2)
    image_size = None if image_size is None else whole_number("image_size", image_size, 1)
    text = model.takes_text
    if data == "samples":
        if text:
            raise ValueError("data='samples': needs classes; for a model that takes text give data with captions")
        return _own_samples(model, count, seed)
    if image_size is None:
        image_size = model.sample_size[-1] * downsampling(vae)
    # Training knows what `data` stands for; of the network it asks how it is conditioned.
    text_settings = {"text_encoder": model.config.text_encoder, "text_length": model.config.text_length} if text else {}
    network = ModelConfig(name="MM-DiT-S/2" if text else "DiT-S/2", **text_settings)
    config = TrainConfig(data=data, image_size=image_size, model=network)
    images = load_data(config)
    if count > len(images):
        raise ValueError(f"count={count}: {data!r} has {len(images)}; give at most so many")
    rows = [i * len(images) // count for i in range(count)]
    batch, labels = images.__getitems__(rows)
    x = _as_latents(batch, images, vae, seed)
    wanted = (model.config.in_channels, *model.sample_size)
    if x.shape[1:] != wanted:
        help = " or the autoencoder that the model was trained in as vae" if vae is None and x.shape[1] == 3 else ""
        raise ValueError(f"data={data!r}: samples of {tuple(x.shape[1:])}, this model takes {wanted}; give such{help}")
    prompts = load_prompts(config, images, model.device)
    y = model.prepare_condition(labels if prompts is None else prompts[labels])
    names = images.classes if prompts is None else images.captions
    origin = {"data": data, "rows": rows, "posterior_seed": seed if isinstance(images, LatentSet) else None}
    return Examples(x, y, tuple(names[label] for label in labels.tolist()), origin)


def _own_samples(model: Transformer, count: int, seed: int) -> Examples:
    """What the model draws of its classes in turn, at full budget without guidance."""
    y = torch.arange(count) % model.config.num_classes
    x = sample(model, y, steps=OWN_STEPS, seed=seed).float().cpu()
    names = model.config.get("class_names") or tuple(map(str, range(model.config.num_classes)))
    drawn = {"data": "samples", "steps": OWN_STEPS, "seed": seed}
    return Examples(x, y, tuple(names[label] for label in y.tolist()), drawn)


def as_pictures(samples: Tensor, vae: ModelMixin | None) -> Tensor:
    """Samples of a network as pictures (B, 1 or 3, H, W) in [-1, 1] on the CPU, of clips the first frame.

    Latents without their autoencoder are no pictures: the mean over their channels then, each from its own least to
    its most.
    """
    pixels = vae is not None or samples.shape[1] in (1, 3)
    with torch.no_grad():
        # Of a clip's latents all are decoded: the first frame of some autoencoders needs those behind it.
        parts = (
            [decode(vae, part.to(vae.device if vae else part.device)) for part in samples.split(8)] if pixels else []
        )
    pictures = torch.cat(parts).float().cpu() if pixels else samples.float().cpu().mean(1, keepdim=True)
    if pictures.ndim == 5:
        pictures = pictures[:, :, 0]
    if not pixels:
        low, high = pictures.amin((1, 2, 3), keepdim=True), pictures.amax((1, 2, 3), keepdim=True)
        pictures = 2 * (pictures - low) / (high - low).clamp(min=1e-6) - 1
    return pictures.clamp(-1, 1)


def _as_latents(batch: Tensor, images: ImageData, vae: ModelMixin | None, seed: int) -> Tensor:
    """What a data set gives, as the network takes it: drawn from posteriors, or encoded (their means)."""
    if isinstance(images, LatentSet):
        return posterior_sample(batch, seeded_noise(range(seed, seed + len(batch)), images.shape))
    if vae is None:
        return batch
    if batch.shape[1] != 3:
        raise ValueError(f"vae: given, but the data has {batch.shape[1]} channels and an autoencoder takes RGB")
    return torch.cat([encode_mean(vae, part).cpu() for part in batch.split(8)])
