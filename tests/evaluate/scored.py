"""A small network of 8×8 grey images, a small detector and pictures, to score with."""

from pathlib import Path

import numpy as np
import torch
from transformers import Dinov2Config, Dinov2Model

import elit
from elit.models.transformer import Transformer


def small_network(name: str = "ELIT-DiT-S/1", **settings) -> Transformer:
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 1, "num_classes": 10, "hidden_size": 16, "num_heads": 2, "depth": 3}
    elastic = {"split": (1, 1, 1), "window": (4, 4)} if name.startswith("ELIT") else {}
    model = elit.create_model(name, **sizes | elastic | settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save_dino(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "mlp_ratio": 1, "image_size": 56}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)


def save_noise(path: Path, *size: int) -> None:
    np.savez(path, np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
