"""diffusers' autoencoders, and normalized latents: (z − mean) / std · scale, about standard normal, (B, z, ...)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from elit.compat import forward_device
from elit.config import require
from elit.files import Json
from elit.models.saved import saved_class, saved_dtype


@dataclass(frozen=True, kw_only=True)
class LatentNormalization:
    """x = (z − mean) / std · scale; mean and std have one entry a channel, or one for all."""

    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @classmethod
    def from_json(cls, settings: Json) -> "LatentNormalization":
        """Reads the output of `to_json`."""
        mean = settings.get("latents_mean") or (settings["shift_factor"],)
        std = settings.get("latents_std") or (1.0,)
        return cls(scale=settings["scaling_factor"], mean=tuple(mean), std=tuple(std))

    def to_json(self) -> Json:
        """Statistics under diffusers' names: shift_factor, or latents_mean and latents_std where channels differ."""
        if len(self.mean) == len(self.std) == 1 and self.std[0] == 1:
            return {"scaling_factor": self.scale, "shift_factor": self.mean[0]}
        statistics = {"latents_mean": list(self.mean), "latents_std": list(self.std)}
        return {"scaling_factor": self.scale, "shift_factor": 0.0} | statistics

    def normalize(self, z: Tensor) -> Tensor:
        """z (B, z, ...), an autoencoder's own latents -> a network's."""
        return (z - self._by_channel(self.mean, z)) / self._by_channel(self.std, z) * self.scale

    def normalize_std(self, std: Tensor) -> Tensor:
        """Standard deviations (B, z, ...) of `z` -> those of a network's latents."""
        return std / self._by_channel(self.std, std) * self.scale

    def denormalize(self, x: Tensor) -> Tensor:
        """x (B, z, ...), a network's latents -> the autoencoder's own."""
        return x * self._by_channel(self.std, x) / self.scale + self._by_channel(self.mean, x)

    @staticmethod
    def _by_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, device=like.device, dtype=like.dtype).view(-1, *[1] * (like.ndim - 2))


def latent_normalization(vae: ModelMixin) -> LatentNormalization:
    """How an autoencoder's latents are normalized. Raises ValueError without statistics in its config."""
    name, config = type(vae).__name__, vae.config
    if name == "AutoencoderRAE":  # applies them itself
        return LatentNormalization()
    buffers = dict(vae.named_buffers())  # LTX and Mochi keep them among their weights
    mean, std = (config.get(key, buffers.get(key)) for key in ("latents_mean", "latents_std"))
    scale, shift = config.get("scaling_factor"), config.get("shift_factor")
    known = (mean is None) == (std is None) and (mean is not None or scale is not None)
    require(known, "vae", name, "an autoencoder with scaling_factor, or latents_mean and latents_std, in its config")
    if mean is None:
        return LatentNormalization(scale=scale, mean=(shift or 0.0,))
    mean, std = (tuple(torch.as_tensor(each, dtype=torch.float64).flatten().tolist()) for each in (mean, std))
    return LatentNormalization(scale=1.0 if scale is None else scale, mean=mean, std=std)


def load_autoencoder(folder: Path, *, required: bool, torch_dtype: torch.dtype | None = None) -> ModelMixin | None:
    """The diffusers autoencoder saved in `folder`; None where there is none and none is required. Raises ValueError."""
    if not required and not folder.is_dir():
        return None
    kind = saved_class(folder, "vae")
    saved_dtype(folder, "vae")  # refuses weights that are not whole
    loader: Any = getattr(diffusers, str(kind), None)
    require(hasattr(loader, "encode"), "vae", str(folder), f"an autoencoder of diffusers and not a {kind}")
    vae = loader.from_pretrained(folder, torch_dtype=torch_dtype)
    latent_normalization(vae)  # refuses one without statistics
    return vae


@torch.no_grad()
def encode_moments(vae: ModelMixin, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels in [-1, 1] (B, C, H, W) or (B, C, T, H, W) -> mean and std of the autoencoder's own latents, float32."""
    frame = pixels.ndim == 4 and is_for_video(vae)
    pixels = (pixels.unsqueeze(2) if frame else pixels).to(forward_device(vae), vae.dtype)
    latents = vae.encode(pixels, return_dict=False)[0]
    mean, std = (latents, torch.zeros_like(latents)) if isinstance(latents, Tensor) else (latents.mean, latents.std)
    mean, std = mean.float(), std.float()
    return (mean.squeeze(2), std.squeeze(2)) if frame else (mean, std)


def encode_mean(vae: ModelMixin, pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] -> the posterior's mean, normalized, float32; shapes as in `encode_moments`."""
    return latent_normalization(vae).normalize(encode_moments(vae, pixels)[0])


def decode(vae: ModelMixin | None, x: Tensor) -> Tensor:
    """A network's samples (B, z, ...) as pixels in [-1, 1], (B, 1 or 3, ...). Raises ValueError for want of a vae."""
    if vae is None:
        require(x.shape[1] in (1, 3), "vae", None, f"given for samples of {x.shape[1]} channels, which are no pixels")
        return x
    z = latent_normalization(vae).denormalize(x).to(vae.dtype)
    frame = z.ndim == 4 and is_for_video(vae)
    pixels = vae.decode(z.unsqueeze(2) if frame else z, return_dict=False)[0]
    return pixels.squeeze(2) if frame else pixels


def downsampling(vae: ModelMixin | None) -> int:
    """Pixels of a latent along rows and columns; 1 without an autoencoder."""
    if vae is None:
        return 1
    ratio = vars(vae).get("spatial_compression_ratio")
    return 2 ** (len(vae.config.block_out_channels) - 1) if ratio is None else ratio


def is_for_video(vae: ModelMixin) -> bool:
    """True for an autoencoder of (B, C, T, H, W): its first convolution has three axes."""
    kinds = (nn.Conv2d, nn.Conv3d)
    return isinstance(next((module for module in vae.modules() if isinstance(module, kinds)), None), nn.Conv3d)
