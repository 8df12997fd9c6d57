"""Everything that decides a score, as JSON, and names made of its hash."""

import hashlib
import json
import platform
from contextlib import suppress
from importlib import metadata

import torch
from diffusers import ModelMixin
from torch import Tensor

from elit._version import __version__
from elit.files import Json
from elit.models.conditioning import Condition
from elit.models.saved import weights_digest
from elit.models.transformer import Transformer
from elit.sampling.autoencoders import latent_normalization

PACKAGES = ("torch", "diffusers", "transformers", "torch-fidelity")
Recipe = Json


def recipe_digest(recipe: Recipe) -> str:
    """SHA-256 of a recipe, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, allow_nan=False).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of the installed packages that numbers may depend on."""
    numbers = {"elit": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):  # an extra that this score did without
            numbers[name] = metadata.version(name)
    return numbers


def describe_network(model: Transformer) -> Recipe:
    """Class, settings and weights."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return {"class": type(model).__name__, "config": config, "weights": weights_digest(model)}


def describe_run(model: Transformer, vae: ModelMixin | None) -> Recipe:
    """Network and autoencoder, and the hardware and versions as far as rounding depends on them."""
    device = model.device
    hardware = {"cpu": f"cpu {torch.backends.cpu.get_cpu_capability()}"}.get(device.type, device.type)
    autoencoder = None
    if vae is not None:
        kind = {"class": type(vae).__name__, "weights": weights_digest(vae)}
        dtype = str(vae.dtype).removeprefix("torch.")
        autoencoder = kind | {"dtype": dtype} | latent_normalization(vae).to_json()
    return {
        "model": describe_network(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else hardware,
        "autoencoder": autoencoder,
        "versions": versions(),
    }


def conditions_digest(conditions: Condition) -> str:
    """SHA-256 of labels or encoded prompts."""
    parts = [conditions] if isinstance(conditions, Tensor) else list(vars(conditions).values())
    total = hashlib.sha256()
    for part in parts:
        total.update(b"-" if part is None else f"{tuple(part.shape)}".encode() + part.cpu().float().numpy().tobytes())
    return total.hexdigest()


def sample_digests(pictures: Tensor) -> Tensor:
    """(B, 32) uint8: the SHA-256 of each picture's shape and bytes; pictures (B, C, ...) uint8."""
    shape = str(tuple(pictures.shape[1:])).encode()
    rows = [hashlib.sha256(shape + picture.contiguous().numpy().tobytes()).digest() for picture in pictures]
    return torch.tensor([list(row) for row in rows], dtype=torch.uint8)
