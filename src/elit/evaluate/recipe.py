"""Everything that decides a score, as JSON, and names made of its hash."""

import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import Tensor

from elit._version import __version__
from elit.evaluate.chunks import Share
from elit.files import Json, write_text
from elit.models.conditioning import Condition
from elit.models.saved import weights_digest
from elit.models.transformer import Transformer
from elit.sampling.autoencoders import latent_normalization

PACKAGES = ("torch", "diffusers", "transformers", "torch-fidelity")
Recipe = Json


def recipe_digest(recipe: Recipe) -> str:
    """SHA-256 of a recipe, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, allow_nan=False).encode()).hexdigest()


def claim_folder(folder: Path, recipe: Recipe, share: Share) -> None:
    """Writes recipe.json into `folder`, in the main process. Raises ValueError where there is one of another recipe."""
    path = folder / "recipe.json"
    if share.main and not path.is_file():
        write_text(path, json.dumps(recipe, indent=2) + "\n")
    elif share.main and json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(recipe)):
        raise ValueError(f"cannot use out={str(folder)!r}: its recipe.json is another one; remove that folder")
    share.wait()


def versions() -> dict[str, str]:
    """Versions of the installed packages that numbers may depend on."""
    numbers = {"elit": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            numbers[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # an extra that this score did without
            continue
    return numbers


def device_name(device: torch.device) -> str:
    """The kind of hardware, as far as rounding depends on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type


def describe_network(model: Transformer) -> Recipe:
    """Class, settings and weights."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return {"class": type(model).__name__, "config": config, "weights": weights_digest(model)}


def describe_autoencoder(vae: ModelMixin | None) -> Recipe | None:
    if vae is None:
        return None
    return {
        "class": type(vae).__name__,
        "weights": weights_digest(vae),
        "dtype": str(vae.dtype).removeprefix("torch."),
        **latent_normalization(vae).to_json(),
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


def set_digest(digests: Tensor) -> str:
    """One SHA-256 for pictures in this order, made of their own: independent of how they were batched."""
    return hashlib.sha256(digests.contiguous().numpy().tobytes()).hexdigest()
