"""Subjects of the benchmarks: networks with nothing left at zero, their inputs, and a step of their training."""

import argparse
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elit
from elit.budgets import Budget
from elit.models.transformer import Transformer

Network = TypeVar("Network", bound=nn.Module)


def network(name: str, sample_size: int, args: argparse.Namespace, **settings: object) -> Transformer:
    """A network with random values everywhere, on the device: one that starts closed would agree with any other.

    args: the device, the channels, and the sizes that --quick shrinks.
    """
    sizes = args.overrides | settings
    torch.manual_seed(0)
    with args.device:
        model = elit.create_model(name, sample_size=sample_size, in_channels=args.in_channels, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def inference(name: str, sample_size: int, args: argparse.Namespace, **settings: object) -> Transformer:
    """A network as it is served: in its dtype, compiled if asked."""
    return served(network(name, sample_size, args, **settings), args)


def served(model: Network, args: argparse.Namespace) -> Network:
    model.requires_grad_(False)
    nn.Module.to(model, args.dtype)  # diffusers' own warns that it does so
    if args.compile:
        model.compile()
    return model


def inputs(model: Transformer, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and y for a forward, every sample another; the same ones for every network of a size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, model.config.in_channels, *model.sample_size, generator=generator)
    t = torch.rand(batch, generator=generator)
    y = model.conditioning.example(batch).to(model.device)
    return x.to(model.device, model.dtype), t.to(model.device), y


class TrainingStep:
    """Forward, backward and Adam, as `elit train` runs them: weights are float32, another dtype means autocast."""

    def __init__(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor], args: argparse.Namespace):
        self.model, self.batch, self.dtype = model.train(), batch, args.dtype
        self.target = torch.randn_like(batch[0])
        # So small a rate changes nothing that is measured; the work is the same.
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-8, fused=True)
        if args.compile:
            model.compile()

    def __call__(self, budget: Budget) -> None:
        device = self.target.device.type
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            v = self.model(*self.batch, budget)
        F.mse_loss(v.float(), self.target).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def resident_bytes(self) -> int:
        """Bytes held between steps: the weights and Adam's two moments."""
        return 3 * sum(parameter.nbytes for parameter in self.model.parameters())


def evenly(budgets: Sequence[int], count: int) -> list[int]:
    """At most `count` of the budgets, largest first: both ends and even steps between, so with the mean of all."""
    if count < 2:
        raise ValueError(f"--budgets {count}: give at least 2, the smallest and all")
    if count >= len(budgets):
        return list(budgets[::-1])
    return [budgets[round(i * (len(budgets) - 1) / (count - 1))] for i in range(count)][::-1]
