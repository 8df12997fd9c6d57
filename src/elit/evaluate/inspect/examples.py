"""Data to inspect a network with: samples as it takes them, their conditions, and their pictures."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from elit.config import ModelConfig, TrainConfig
from elit.data.images import ImageData
from elit.data.latents import LatentSet, posterior_sample
from elit.models.conditioning import Condition
from elit.models.transformer import Transformer
from elit.sampling.autoencoders import decode, downsampling, encode_mean
from elit.sampling.noise import seeded_noise
from elit.sampling.sample import sample
from elit.training.train import load_data, load_prompts

OWN_STEPS = 20


@dataclass(frozen=True)
class Examples:
    """Some samples of a data set, evenly spaced over it."""

    x: Tensor
    """(B, C, ...) float32 on the CPU, as the network takes them."""
    y: Condition
    """Their conditions, B rows on the CPU."""
    names: tuple[str, ...]
    """Class or caption of each."""
    origin: dict[str, Any]
    """Their origin, as JSON."""


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

    vae: the autoencoder that the network was trained in, to encode pictures. image_size: a folder's images are cut to
    it, default the network's size. seed: of the draw from each latent's posterior.
    Raises ValueError where the data is missing, too small, or does not fit the network.
    """
    text = model.takes_text
    if data == "samples":
        if text:
            raise ValueError("data='samples' is not supported for a model that takes text: give data with captions")
        return _own_samples(model, count, seed)
    if image_size is None:
        image_size = model.sample_size[-1] * downsampling(vae)
    # Training opens `data` by its config, which has to name a network with the same kind of condition.
    text_settings = {"text_encoder": model.config.text_encoder, "text_length": model.config.text_length} if text else {}
    network = ModelConfig(name="MM-DiT-S/2" if text else "DiT-S/2", **text_settings)
    config = TrainConfig(data=data, image_size=image_size, model=network)
    images = load_data(config)
    if count > len(images):
        raise ValueError(f"count must be at most {len(images)}, the size of {data!r}, got {count}")
    rows = [i * len(images) // count for i in range(count)]
    batch, labels = images.__getitems__(rows)
    x = _as_latents(batch, images, vae, seed)
    wanted = (model.config.in_channels, *model.sample_size)
    if x.shape[1:] != wanted:
        hint = "; give vae, the autoencoder that it was trained in" if vae is None and x.shape[1] == 3 else ""
        raise ValueError(f"data={data!r} must have samples of {wanted} for this model, got {tuple(x.shape[1:])}{hint}")
    prompts = load_prompts(config, images, model.device)
    y = model.prepare_condition(labels if prompts is None else prompts[labels])
    names = images.classes if prompts is None else images.captions
    origin = {"data": data, "rows": rows, "posterior_seed": seed if isinstance(images, LatentSet) else None}
    return Examples(x, y, tuple(names[label] for label in labels.tolist()), origin)


def _own_samples(model: Transformer, count: int, seed: int) -> Examples:
    """The model's samples of its classes in turn, at full budget without guidance."""
    y = torch.arange(count) % model.config.num_classes
    x = sample(model, y, steps=OWN_STEPS, seed=seed).float().cpu()
    names = model.config.get("class_names") or tuple(map(str, range(model.config.num_classes)))
    origin = {"data": "samples", "steps": OWN_STEPS, "seed": seed}
    return Examples(x, y, tuple(names[label] for label in y.tolist()), origin)


def as_pictures(samples: Tensor, vae: ModelMixin | None) -> Tensor:
    """Samples of a network as pictures (B, 1 or 3, H, W) in [-1, 1] on the CPU, of clips the first frame.

    Latents without their autoencoder become the mean over their channels, each scaled to its own range.
    """
    pixels = vae is not None or samples.shape[1] in (1, 3)
    pictures = samples
    if pixels:
        # All latents of a clip are decoded: the first frame of some autoencoders needs the later ones.
        with torch.no_grad():
            pictures = torch.cat(
                [decode(vae, part.to(vae.device if vae else part.device)) for part in samples.split(8)]
            )
    pictures = pictures.float().cpu() if pixels else pictures.float().cpu().mean(1, keepdim=True)
    if pictures.ndim == 5:
        pictures = pictures[:, :, 0]
    if not pixels:
        low, high = pictures.amin((1, 2, 3), keepdim=True), pictures.amax((1, 2, 3), keepdim=True)
        pictures = 2 * (pictures - low) / (high - low).clamp(min=1e-6) - 1
    return pictures.clamp(-1, 1)


def _as_latents(batch: Tensor, images: ImageData, vae: ModelMixin | None, seed: int) -> Tensor:
    """Rows of a data set as the network takes them: drawn from posteriors, or encoded (their means)."""
    if isinstance(images, LatentSet):
        return posterior_sample(batch, seeded_noise(range(seed, seed + len(batch)), images.shape))
    if vae is None:
        return batch
    if batch.shape[1] != 3:
        raise ValueError(f"cannot encode data of {batch.shape[1]} channels: an autoencoder takes RGB")
    return torch.cat([encode_mean(vae, part).cpu() for part in batch.split(8)])
