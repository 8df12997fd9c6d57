"""Claim 7: Read attends where the flow-matching loss is high; early latents attend broadly, late ones sparsely
(paper Figures 2 and 12).

On digits not trained on, at five times: Spearman's correlation over the 16 tokens of every window between how much all
latents read of a token and the loss there, mean over images, windows and times; and the entropy of every latent's
attention, 1 = evenly over its window. Attention is the mean over heads. Windows in which nothing is drawn count too.
"""

from collections.abc import Sequence

import torch
from arms import FULL, WINDOW, data, matched, train_or_load
from command import arguments
from record import Record, Values
from torch import Tensor

from elit.evaluate.inspect.attention import read_attention
from elit.flow.path import interpolate
from elit.models.dit import DiT
from elit.models.layers import patchify
from elit.models.windows import Windows
from elit.sampling.sample import seeded_noise

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
DRAWS = 4  # noises behind the loss and the attention of an image at a time
ENDS = 4  # how many latents are "early", and how many "late"


@torch.no_grad()
def look(model: DiT, images: Tensor, labels: Tensor, time: float) -> tuple[Tensor, Tensor]:
    """Attention (B, J, H, W) and squared error (B, H, W) at one time, mean over noises."""
    t = torch.full((len(images),), time)
    maps, losses = [], []
    for number in range(DRAWS):
        first = 10**7 + 10**4 * number
        noise = seeded_noise(range(first, first + len(images)), images.shape[1:])
        x, at, y = (value.to(model.device) for value in (interpolate(noise, images, t), t, labels))
        maps.append(read_attention(model, x, at, y).cpu())
        losses.append((model(x, at, y).cpu() - (images - noise)).square().mean(1))
    return torch.stack(maps).mean(0), torch.stack(losses).mean(0)


def windows(maps: Tensor) -> Tensor:
    """(B, K, H, W) -> (B·G, n, K)."""
    return patchify(maps, (1, 1), Windows(tuple(maps.shape[2:]), WINDOW)).unflatten(1, (-1, 16)).flatten(0, 1)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation over the last axis; there are no ties among floats worth the name."""
    ranks = [part.argsort(-1).argsort(-1).double() for part in (a, b)]
    x, y = (rank - rank.mean(-1, keepdim=True) for rank in ranks)
    return (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()


def main(line: Sequence[str] | None = None) -> None:
    args = arguments(line, __doc__, __file__)
    notes = "multi-budget ELIT-DiT at full budget, 16 latents in each of 4 windows of 4×4 pixels"
    record = Record(args, 7, notes)

    def fall_of_entropy(values: Values, seed: int) -> float:
        return values["early latents", "entropy"][seed] - values["late latents", "entropy"][seed]

    record.part(
        "attention and loss have a positive rank correlation inside windows",
        "rank correlation",
        lambda values, seed: values["all times", "attention and loss"][seed],
    )
    record.part("the first 4 latents attend more evenly than the last 4", "entropy", fall_of_entropy)
    record.part(
        "entropy falls from latent to latent",
        "− rank correlation",
        lambda values, seed: -values["all times", "latent's number and entropy"][seed],
    )

    images, labels = (part[: args.samples] for part in (data()[1].images, data()[1].labels))
    for seed in range(args.seeds):
        config = matched(args, seed, FULL)
        record.arm("multi-budget", config)
        model = train_or_load(args, config)
        correlations, entropies = [], []
        for time in TIMES:
            maps, loss = look(model, images, labels, time)
            attention = windows(maps)  # (B·G, n, J)
            correlations.append(spearman(attention.sum(-1), windows(loss[:, None])[..., 0]).mean().item())
            entropies.append(-(attention * attention.log()).sum(1).mean(0) / torch.tensor(16.0).log())  # (J,)
            record.add(f"t = {time}", seed, **{"attention and loss": correlations[-1]})
        entropy = torch.stack(entropies).mean(0)
        falls = spearman(torch.arange(len(entropy)), entropy).item()
        scores = {"attention and loss": sum(correlations) / len(TIMES), "latent's number and entropy": falls}
        record.add("all times", seed, **scores)
        record.add("early latents", seed, entropy=entropy[:ENDS].mean().item())
        record.add("late latents", seed, entropy=entropy[-ENDS:].mean().item())
        record.save(range(seed + 1))


if __name__ == "__main__":
    main()
