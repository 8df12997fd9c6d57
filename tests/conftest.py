"""Shared by all tests: small networks of every kind whose every path is open."""

from __future__ import annotations

import gc
import hashlib
import os
import re
import struct
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
gc.set_threshold(50_000)  # importing makes much that is no garbage

# Imported where they are used: the process that only deals tests out to workers needs none of it.
if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, AutoencoderKLCogVideoX

    from elit.data.images import ImageSet
    from elit.evaluate.detectors import TrainedClassifier
    from elit.models.transformer import Transformer

# Small networks; ELIT has 4 groups of 4×4 tokens, or 8 of 1×2×2 for video.
SIZES = {"sample_size": 16, "in_channels": 4, "hidden_size": 48, "num_heads": 4, "depth": 4}
IMAGE = SIZES | {"num_classes": 5}
VIDEO = IMAGE | {"sample_size": (2, 8, 8), "patch_size": (1, 2, 2)}
CHARACTERS = SIZES | {"text_features": 24, "pooled_features": 24, "text_length": 12}
EMBEDDINGS = SIZES | {"text_encoder": "some/encoder", "text_features": 20, "pooled_features": 10, "text_length": 7}
LATENTS = {"split": (1, 2, 1), "window": (4, 4)}
SETTINGS = {
    "dit": ("DiT-S/2", IMAGE),
    "elit-dit": ("ELIT-DiT-S/2", IMAGE | LATENTS),
    "dit-video": ("DiT-S/2-Video", VIDEO),
    "elit-dit-video": ("ELIT-DiT-S/2-Video", VIDEO | {"split": (1, 2, 1), "window": (1, 2, 2)}),
    "uvit": ("U-ViT-S/2", IMAGE | {"depth": 6}),
    "elit-uvit": ("ELIT-U-ViT-S/2", IMAGE | LATENTS | {"depth": 6, "split": (1, 4, 1)}),
    "hdit": ("HDiT-S/2", IMAGE),
    "sit": ("SiT-S/2", IMAGE),
    "elit-sit": ("ELIT-SiT-S/2", IMAGE | LATENTS),
    "elit-hdit": ("ELIT-HDiT-S/2", IMAGE | LATENTS),
    "mmdit": ("MM-DiT-S/2", CHARACTERS),
    "elit-mmdit": ("ELIT-MM-DiT-S/2", CHARACTERS | LATENTS),
    "mmdit-embeddings": ("MM-DiT-S/2", EMBEDDINGS),
    "elit-mmdit-embeddings": ("ELIT-MM-DiT-S/2", EMBEDDINGS | LATENTS | {"pooled_features": 0}),
}
# Still smaller ones, saved for commands.
TINY = {"in_channels": 1, "hidden_size": 16, "num_heads": 1, "depth": 3}
DIGITS = {"sample_size": 8, "num_classes": 10}
INTERFACE = {"split": (1, 1, 1), "window": (4, 4)}
TEXT = {"sample_size": 8, "text_length": 24, "text_features": 16, "pooled_features": 16}
SAVED = {
    "model": ("ELIT-DiT-S/1", DIGITS | INTERFACE),
    "plain": ("DiT-S/1", DIGITS),
    "few": ("ELIT-DiT-S/1", DIGITS | INTERFACE | {"num_classes": 5}),
    "text": ("ELIT-MM-DiT-S/1", TEXT | INTERFACE),
    "clips": ("ELIT-DiT-S/1-Video", {"sample_size": (4, 8, 12)} | INTERFACE | {"window": (2, 2, 3), "num_latents": 4}),
}
ELIT = [kind for kind in SETTINGS if kind.startswith("elit-")]


def fresh(kind: str, **changes) -> Transformer:
    import torch

    from elit.models.presets import create_model

    name, settings = SETTINGS[kind]
    torch.manual_seed(0)
    return create_model(name, **settings | changes)


def opened(kind: str, **changes) -> Transformer:
    """A small network with random values everywhere: nothing starts at zero, so nothing hides."""
    import torch

    model = fresh(kind, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def small_vae(**settings) -> AutoencoderKL:
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        **settings,
    ).eval()


def small_video_vae() -> AutoencoderKLCogVideoX:
    """CogVideoX's autoencoder of random weights: 4 channels, 2 latent frames are 8 frames."""
    import torch
    from diffusers import AutoencoderKLCogVideoX

    torch.manual_seed(0)
    blocks = {"down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4}
    sizes = {"block_out_channels": (8, 8, 8, 8), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2}
    return AutoencoderKLCogVideoX(**blocks, **sizes).eval()


def idx(values: torch.Tensor) -> bytes:
    """uint8 of any shape as an IDX file holds them."""
    return struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.numpy().tobytes()


def conditions(model: Transformer, batch: int):
    """y for a network, on the CPU: labels, characters or embeddings with padding, every sample another."""
    import torch

    from elit.models.conditioning import Text

    torch.manual_seed(2)
    y = model.conditioning.example(batch)
    if isinstance(y, Text):
        padded = torch.arange(y.mask.shape[1]) < 1 + torch.arange(batch)[:, None] % y.mask.shape[1]
        return Text(y.embeddings, padded, y.pooled if model.config.pooled_features else None)
    return y


def inputs(model: Transformer, batch: int = 3, size: tuple[int, ...] | None = None) -> tuple:
    """x, t, y for a network; the last sample has no condition."""
    import torch

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, model.config.in_channels, *(size or model.sample_size), generator=generator)
    t = torch.rand(batch, generator=generator)
    return x, t, model.conditioning.without(conditions(model, batch), torch.arange(batch) == batch - 1)


def links_of(page: str) -> list[str]:
    return re.findall(r"""\b(?:src|href)=["']([^"']*)["']""", page)


@pytest.fixture(params=list(SETTINGS))
def any_model(request: pytest.FixtureRequest) -> Transformer:
    return opened(request.param)


@pytest.fixture(params=ELIT)
def elit_model(request: pytest.FixtureRequest) -> Transformer:
    return opened(request.param)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from elit.models.presets import create_model
    from elit.models.saved import save_model

    folder = tmp_path_factory.mktemp("models")
    for name, (preset, settings) in SAVED.items():
        torch.manual_seed(0)
        save_model(create_model(preset, **TINY | settings), folder / name)
    return folder


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    from elit.cli.main import main

    def command(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        out = capsys.readouterr()
        return code, out.out, out.err

    return command


@pytest.fixture(scope="session")
def digit_classifiers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., TrainedClassifier]]:
    """The trainer of the detector "digits"; the first worker that needs its classifier trains it for all."""
    import filelock
    import torch

    from elit.evaluate import detectors
    from elit.evaluate.detectors import train_digit_classifier

    own = tmp_path_factory.getbasetemp()
    folder = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def train(data: ImageSet, *, epochs: int = 25, seed: int = 0) -> TrainedClassifier:
        digest = hashlib.sha256(data.images.numpy().tobytes()).hexdigest()
        file = folder / f"digit-classifier-{digest[:16]}-{epochs}-{seed}.pt"
        with filelock.FileLock(f"{file}.lock"):
            if not file.is_file():
                torch.save(train_digit_classifier(data, epochs=epochs, seed=seed), file)
        return torch.load(file, weights_only=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detectors, "train_digit_classifier", train)
        patch.setattr(detectors, "_digit_classifier", cache(detectors._digit_classifier.__wrapped__))
        yield train


# The longest files, first: a long one that is begun last keeps one worker busy while the other waits.
LONGEST = (
    *("test_quickstart", "test_processes", "test_deployment", "test_docs", "test_fuzz"),
    *("test_precision", "test_loop", "test_guide", "test_page", "test_recipes"),
    *("test_benchmarks", "test_studies", "test_sweep", "test_samples", "test_saved", "test_distill", "test_faults"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Stable, so that a file's tests stay together and in their order."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files that fork from the process of `commands.py` go to one worker, so that it is made once."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope_of(config.rootpath / super()._split_scope(nodeid))

    return Scheduling(config, log)


@cache
def scope_of(file: Path) -> str:
    return "processes" if "\nfrom commands import" in file.read_text(encoding="utf-8") else str(file)
