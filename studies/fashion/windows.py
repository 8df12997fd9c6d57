"""Is a latent worth more in one window than in another? The paper keeps the same number in all of them.

At the same total, J̃_g latents are kept of window g: many where there is much to do, few on empty background. Nothing is
trained for it. What a window needs is judged, at every step, by how far its pixels are from flat in the network's own
estimate of the picture, x + (1 − t)·v of the step before. That is compared with the same number everywhere.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from scores import score
from study import Study
from torch import Tensor

from elit.flow.solver import time_grid
from elit.models.dit import DiT
from elit.models.layers import Rope, attend, patchify, unpatchify
from elit.sampling.sample import seeded_noise

SHARES = (8, 4, 2)  # mean latents a window
LEAST = 1
STEPS = 16


def forward(model: DiT, x: Tensor, t: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """The network with counts (B, G) latents of each window; every row has the same sum.

    At equal counts it is `model(x, t, y, count)`; tests compare them.
    """
    interface = model.latent_interface
    assert interface is not None
    head, core, tail = model.stages()
    windows = model.windows(x.shape[2:], x)
    every = len(interface.latents)
    (c,) = model.conditioning(t, y)
    rope = model.rope(windows)
    tokens = model.embed(x, windows)
    for block in head:
        tokens = block(tokens, c, rope)
    latents = interface.read(tokens, c, windows, every)  # (B, G·J, d); a latent's value does not depend on the others
    keep = torch.arange(every) < counts[..., None]  # (B, G, J)
    total = int(counts[0].sum())
    rows = keep.flatten(1).nonzero()[:, 1].view(len(x), total)
    core_latents = latents.gather(1, rows[..., None].expand(-1, -1, latents.shape[2]))
    own = Rope(*(table[rows] for table in model.rope(windows, every)))  # each sample has rotary positions of its own
    for block in core:
        core_latents = block(core_latents, c, own)
    latents = latents.scatter(1, rows[..., None].expand(-1, -1, latents.shape[2]), core_latents)
    tokens = write(interface.writer, interface.position, tokens, latents, keep)
    for block in tail:
        tokens = block(tokens, c, rope)
    return unpatchify(model.final(tokens, c), model.patch_size, windows)


def write(writer: Any, position: Tensor, tokens: Tensor, latents: Tensor, keep: Tensor) -> Tensor:
    """Write with a mask over the latents of each window: tokens (B, N, d), latents (B, G·J, d), keep (B, G, J)."""
    groups, every = keep.shape[1:]
    of_group = tokens.unflatten(1, (groups, -1)).flatten(0, 1)
    context = latents.unflatten(1, (groups, every)).flatten(0, 1)
    queries = writer.norm_tokens(of_group + position)
    q, k, v = writer.attention.project(queries, writer.norm_latents(context))
    mixed = attend(q, k, v, keep.flatten(0, 1)[:, None, None])
    x = of_group + writer.attention.proj(mixed)
    return (x + writer.mlp(writer.norm_mlp(x))).view_as(tokens)


def shares_to_counts(need: Tensor, mean: int, most: int) -> Tensor:
    """need (B, G) ≥ 0 -> whole counts (B, G) in LEAST … most that sum to G·mean, in proportion to need."""
    groups = need.shape[1]
    counts = torch.full(need.shape, LEAST)
    for _ in range(groups * (mean - LEAST)):
        # Each next latent goes to the window with the most need for each latent that it has.
        worth = torch.where(counts < most, need / counts, -1.0)
        counts[torch.arange(len(need)), worth.argmax(1)] += 1
    return counts


def contrast(model: DiT, estimate: Tensor) -> Tensor:
    """(B, G): the standard deviation of each window's pixels in an estimate of the picture, and a little for all."""
    tokens = patchify(estimate, model.patch_size, model.windows(estimate.shape[2:], estimate))
    return tokens.unflatten(1, (-1, torch.Size(model.window(model.sample_size)).numel())).flatten(2).std(2) + 0.05


@torch.no_grad()
def draw(model: DiT, labels: Tensor, mean: int, need: Callable[[DiT, Tensor], Tensor] | None, seed: int) -> Tensor:
    """Euler samples with `mean` latents a window on average; need=None keeps the same number in all."""
    groups = (
        torch.Size(model.token_grid(model.sample_size)).numel() // torch.Size(model.window(model.sample_size)).numel()
    )
    most = model.budgets[-1]
    x = seeded_noise(range(seed, seed + len(labels)), (model.config.in_channels, *model.sample_size))
    counts = torch.full((len(labels), groups), mean)
    times = time_grid(STEPS)
    for t, following in itertools.pairwise(times):
        velocity = forward(model, x.to(model.dtype), torch.full((len(x),), t), labels, counts)
        if need is not None:
            counts = shares_to_counts(need(model, x + (1 - t) * velocity), mean, most)
        x = x + (following - t) * velocity
    return x


def main(line: Sequence[str] | None = None) -> None:
    study = Study("windows", __doc__, line)
    for seed in study.args.seeds:
        step, model = study.network("ELIT multi-budget", seed)
        model.to(torch.bfloat16)
        for mean in SHARES:
            for name, need in (("the same everywhere", None), ("by contrast", contrast)):

                def make(mean: int = mean, need: Any = need, model: DiT = model) -> dict[str, float]:
                    labels = torch.arange(study.args.samples) % 10
                    parts = labels.split(250)
                    images = [draw(model, part, mean, need, 5000 + 250 * i) for i, part in enumerate(parts)]
                    return score(torch.cat(images), labels)

                way = f"{mean} of 16, {name}"
                key = {"arm": "windows", "seed": seed, "step": step, "name": way, "samples": study.args.samples}
                study.row(way, seed, study.scores.get(key, make))
    for mean in SHARES:
        says = f"{mean} latents a window on average have a lower FD when dealt out by contrast"
        study.compare(says, f"{mean} of 16, by contrast", f"{mean} of 16, the same everywhere")
    study.write(f"multi-budget ELIT, {STEPS} Euler steps, no guidance")


if __name__ == "__main__":
    main()
