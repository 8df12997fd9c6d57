"""Shared by all tests: small networks whose every path is open."""

import os

import pytest
import torch
from diffusers import AutoencoderKL

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from elit.models.dit import DiT
from elit.models.presets import create_model

# Small networks; ELIT has 4 groups of 4×4 tokens, or 8 of 1×2×2 for video.
IMAGE = {"sample_size": 16, "in_channels": 4, "num_classes": 5, "hidden_size": 48, "num_heads": 4, "depth": 4}
VIDEO = IMAGE | {"sample_size": (2, 8, 8), "patch_size": (1, 2, 2)}
SETTINGS = {
    "dit": ("DiT-S/2", IMAGE),
    "elit-dit": ("ELIT-DiT-S/2", IMAGE | {"split": (1, 2, 1), "window": (4, 4)}),
    "dit-video": ("DiT-S/2", VIDEO),
    "elit-dit-video": ("ELIT-DiT-S/2", VIDEO | {"split": (1, 2, 1), "window": (1, 2, 2)}),
}


def opened(kind: str) -> DiT:
    """A small network with random values everywhere: nothing starts at zero, so nothing hides."""
    name, settings = SETTINGS[kind]
    torch.manual_seed(0)
    model = create_model(name, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def small_vae(**settings) -> AutoencoderKL:
    """An autoencoder of random weights, 4 channels, f2."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        **settings,
    ).eval()


def inputs(model: DiT, batch: int = 3, size: tuple[int, ...] | None = None) -> tuple[torch.Tensor, ...]:
    """x, t, y for a network; the last label is the null class."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, model.config.in_channels, *(size or model.sample_size), generator=generator)
    t = torch.rand(batch, generator=generator)
    y = torch.arange(batch) % model.config.num_classes
    y[-1] = model.config.num_classes
    return x, t, y


@pytest.fixture(params=list(SETTINGS))
def any_model(request: pytest.FixtureRequest) -> DiT:
    return opened(request.param)


@pytest.fixture(params=["elit-dit", "elit-dit-video"])
def elit_model(request: pytest.FixtureRequest) -> DiT:
    return opened(request.param)
