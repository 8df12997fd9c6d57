"""The straight path from noise to data (paper section 2). t = 0 is noise, t = 1 is data."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:  # algebra needs no torch
    from torch import Tensor

TimeT = TypeVar("TimeT", float, "Tensor")


def interpolate(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """X_t = (1 − t)·X0 + t·X1 for noise x0 and data x1, both (B, ...), and t (B,)."""
    t = t.view(-1, *[1] * (x1.ndim - 1))
    return (1 - t) * x0 + t * x1


def target_velocity(x0: Tensor, x1: Tensor) -> Tensor:
    """v = X1 − X0, the derivative of `interpolate` in t."""
    return x1 - x0


def logit_normal(normal: Tensor, shift: float = 1.0) -> Tensor:
    """Training times from standard normals: t = sigmoid(normal), then `shift_time`. Same shape, in (0, 1)."""
    return shift_time(normal.sigmoid(), shift)


def shift_time(t: TimeT, shift: float) -> TimeT:
    """Times nearer to noise, SD3's s·σ / (1 + (s − 1)·σ) with σ = 1 − t; Qwen-Image has 2.22, and 2.0 in sampling."""
    return t / (t + shift * (1 - t))


def flow_matching_loss(velocity: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
    """Mean squared error to the target velocity of each sample (B,), in float32, nothing added."""
    return (velocity.float() - target_velocity(x0, x1).float()).square().flatten(1).mean(1)
