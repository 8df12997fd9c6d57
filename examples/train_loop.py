"""A training loop of one's own around an elastic network: no command line, no config file, a minute on one core.

Trains on scikit-learn's digits with a budget drawn anew in each step, then prints the loss at several budgets and
writes samples of all ten classes, a budget a row, to runs/train-loop.png.
"""

import sys
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits

import elit
from elit.flow import flow_matching_loss, interpolate, logit_normal


def loss(model: torch.nn.Module, x1: torch.Tensor, y: torch.Tensor, budget: int, draw: torch.Generator) -> torch.Tensor:
    """Rectified flow: the velocity from noise x0 to data x1 at logit-normal times."""
    x0, t = torch.randn(x1.shape, generator=draw), logit_normal(torch.randn(len(x1), generator=draw))
    return flow_matching_loss(model(interpolate(x0, x1, t), t, y, budget), x0, x1).mean()


def main(steps: int = 600, out: Path = Path("runs/train-loop.png")) -> None:
    torch.manual_seed(0)
    digits, draw = load_digits(), torch.Generator().manual_seed(0)
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(digits.target)
    sizes = {"sample_size": 8, "in_channels": 1, "num_classes": 10, "hidden_size": 64, "depth": 6, "num_heads": 2}
    model = elit.create_model("ELIT-DiT-S/1", **sizes, split=(1, 4, 1), window=(4, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        rows = torch.randint(1500, (64,), generator=draw)
        labels = torch.where(torch.rand(64, generator=draw) < 0.1, 10, y[rows])  # 10 is "no class", for guidance
        optimizer.zero_grad()
        loss(model, x[rows], labels, elit.draw_budget(0, step, model.budgets), draw).backward()
        optimizer.step()
    pictures = []
    for budget in (16, 8, 4, 1):
        with torch.no_grad():
            error = loss(model, x[1500:], y[1500:], budget, torch.Generator().manual_seed(1))
        print(f"{budget:>2} latents: loss {error:.4f}, {elit.count_flops(model, budget=budget) / 1e6:.1f} MFLOPs")
        images = elit.sample(model, list(range(10)), steps=16, budget=budget, guidance=elit.CFG(1.5), seed=0)
        pictures.append(torch.cat(list(images[:, 0]), 1))
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((torch.cat(pictures).clamp(-1, 1) * 127.5 + 127.5).byte().numpy()).resize((640, 256), 0).save(out)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
