"""A plain torch diffusion transformer on scikit-learn's digits, with and without ELIT's interface around its core.

    python examples/own_transformer.py [--steps 500]

Prints the flow-matching loss on held-out digits and the milliseconds of a forward, plain and at each budget. It takes
about two minutes on one core.
"""

import argparse
import time

import torch
from sklearn.datasets import load_digits
from torch import nn

import elit

WIDTH, SIDE, BUDGETS = 64, 8, range(1, 17)  # one token a pixel, four windows of 4×4, 16 latents each


class Denoiser(nn.Module):
    """Head, core and tail of torch's own encoder layers; the interface, if any, is around the core."""

    def __init__(self, interface: elit.LatentInterface | None = None):
        super().__init__()
        self.embed, self.out = nn.Linear(1, WIDTH), nn.Linear(WIDTH, 1)
        self.position = nn.Parameter(0.1 * torch.randn(SIDE * SIDE, WIDTH))
        self.condition = nn.Linear(1 + 10, WIDTH)  # time and class
        self.place = nn.Linear(3, WIDTH)  # of a latent: its slot, its window's row and column
        options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        layers = [nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, **options) for _ in range(6)]
        self.head, self.core, self.tail = layers[0], nn.Sequential(*layers[1:5]), layers[5]
        self.interface = interface

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, budget: int | None = None) -> torch.Tensor:
        c = self.condition(torch.cat((t[:, None], nn.functional.one_hot(y, 10)), 1))[:, None]
        s = self.head(self.embed(x.flatten(1)[..., None]) + self.position + c)
        if self.interface is None:
            s = self.core(s)
        else:
            s = self.interface(s, lambda z, at: self.core(z + self.place(at) + c), grid=(SIDE, SIDE), budget=budget)
        return self.out(self.tail(s)).view_as(x)


def loss(model: Denoiser, x1: torch.Tensor, y: torch.Tensor, budget: int | None, seed: int) -> torch.Tensor:
    """Rectified flow: the velocity from noise to data at logit-normal times."""
    draw = torch.Generator().manual_seed(seed)
    x0, t = torch.randn(x1.shape, generator=draw), torch.randn(len(x1), generator=draw).sigmoid()
    at = t.view(-1, 1, 1)
    return (model((1 - at) * x0 + at * x1, t, y, budget) - (x1 - x0)).square().mean()


def main(steps: int = 500) -> None:
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32) / 8 - 1, torch.tensor(digits.target)
    for interface in (None, elit.LatentInterface(WIDTH, 4, (4, 4), 16)):
        torch.manual_seed(0)
        model = Denoiser(interface)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(steps):
            rows = torch.randint(0, 1500, (32,))
            budget = elit.draw_budget(0, step, BUDGETS) if interface else None
            optimizer.zero_grad()
            loss(model, x[rows], y[rows], budget, step).backward()
            optimizer.step()
        for budget in (16, 8, 4, 1) if interface else (None,):
            with torch.no_grad():
                start = time.perf_counter()
                error = loss(model, x[1500:], y[1500:], budget, -1)
            ms = 1e3 * (time.perf_counter() - start) / 297
            print(f"{f'{budget} latents' if budget else 'plain':>10}: loss {error:.4f}, {ms:.3f} ms a sample")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="training steps of each network (default: 500)")
    main(parser.parse_args().steps)
