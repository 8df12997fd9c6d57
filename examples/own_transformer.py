"""A plain transformer on digits, without and with ELIT's interface: loss and time at each budget (2 minutes)."""

import time

import torch
from sklearn.datasets import load_digits
from torch import nn

import elit

WIDTH, SIDE = 64, 8  # one token a pixel, in four windows


class Denoiser(nn.Module):
    def __init__(self, interface: elit.LatentInterface | None):
        super().__init__()
        self.embed, self.out = nn.Linear(1, WIDTH), nn.Linear(WIDTH, 1)
        self.position = nn.Parameter(0.1 * torch.randn(SIDE * SIDE, WIDTH))
        self.condition, self.place = nn.Linear(1 + 10, WIDTH), nn.Linear(3, WIDTH)  # time and class; slot, row, column
        options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        self.head, *core, self.tail = (nn.TransformerEncoderLayer(WIDTH, 4, 256, **options) for _ in range(6))
        self.core, self.interface = nn.Sequential(*core), interface

    def forward(self, x, t, y, budget=None):
        c = self.condition(torch.cat((t[:, None], nn.functional.one_hot(y, 10)), 1))[:, None]
        s = self.head(self.embed(x.flatten(1)[..., None]) + self.position + c)
        if self.interface:  # z: the latents of all windows; at: slot, row and column of each
            s = self.interface(s, lambda z, at: self.core(z + self.place(at) + c), grid=(SIDE, SIDE), budget=budget)
        else:
            s = self.core(s)
        return self.out(self.tail(s)).view_as(x)


def loss(model, x1, y, budget, seed):
    draw = torch.Generator().manual_seed(seed)
    x0, t = torch.randn(x1.shape, generator=draw), elit.flow.logit_normal(torch.randn(len(x1), generator=draw))
    return elit.flow.flow_matching_loss(model(elit.flow.interpolate(x0, x1, t), t, y, budget), x0, x1).mean()


def main(steps: int = 500) -> None:
    pixels, y = map(torch.tensor, load_digits(return_X_y=True))
    x = pixels.float().view(-1, SIDE, SIDE) / 8 - 1
    for interface in (None, elit.LatentInterface(WIDTH, 4, (4, 4), 16)):
        torch.manual_seed(0)
        model = Denoiser(interface)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(steps):
            rows, budget = torch.randint(0, 1500, (32,)), elit.draw_budget(0, step, range(1, 17)) if interface else None
            optimizer.zero_grad()
            loss(model, x[rows], y[rows], budget, step).backward()
            optimizer.step()
        for budget in (16, 8, 4, 1) if interface else (None,):
            start = time.perf_counter()
            error = loss(model, x[1500:], y[1500:], budget, -1).item()
            ms, name = 1e3 * (time.perf_counter() - start) / 297, f"{budget} latents" if budget else "plain"
            print(f"{name:>10}: loss {error:.4f}, {ms:.3f} ms a sample")


if __name__ == "__main__":
    main()
