"""Claim 7: Read attends where the flow-matching loss is high; early latents attend broadly, late ones sparsely
(paper Figures 2 and 12).

On test pictures, at five times: the rank correlation over the 16 tokens of a window between how much all latents read
of a token and the loss there, mean over windows and times for every picture; and the entropy of every latent's
attention, 1 = evenly over its window. Errors are standard errors over the pictures.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from scores import test_pictures
from study import Study, verdict
from torch import Tensor

from elit.evaluate.inspect.attention import rank_correlation, read_attention
from elit.flow.path import interpolate
from elit.models.dit import DiT
from elit.models.layers import patchify
from elit.models.windows import Windows
from elit.sampling.sample import seeded_noise

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
DRAWS = 4
ENDS = 4  # how many latents are "early", and how many "late"


@torch.no_grad()
def look(model: DiT, images: Tensor, labels: Tensor, time: float) -> tuple[Tensor, Tensor]:
    """Attention (B, J, 8, 8) and squared error (B, 8, 8) of every token at one time, mean over noises."""
    t = torch.full((len(images),), time)
    maps, losses = [], []
    for number in range(DRAWS):
        first = 10**7 + 10**5 * number
        noise = seeded_noise(range(first, first + len(images)), images.shape[1:])
        x = interpolate(noise, images, t)
        maps.append(read_attention(model, x, t, labels))
        error = (model(x, t, labels) - (images - noise)).square()
        losses.append(F.avg_pool2d(error, model.patch_size[0]).mean(1))
    return torch.stack(maps).mean(0), torch.stack(losses).mean(0)


def by_window(maps: Tensor, window: tuple[int, ...]) -> Tensor:
    """(B, K, H, W) of tokens -> (B, G, n, K)."""
    tokens = torch.Size(window).numel()
    return patchify(maps, (1, 1), Windows(tuple(maps.shape[2:]), window)).unflatten(1, (-1, tokens))


def main(line: Sequence[str] | None = None) -> None:
    study = Study("claim7", __doc__, line)
    count = min(study.args.samples, 500)
    images, labels = test_pictures().__getitems__(list(range(count)))
    for seed in study.args.seeds:
        _, model = study.network("ELIT multi-budget", seed)
        correlations, entropies = [], []
        for time in TIMES:
            maps, loss = look(model, images, labels, time)
            attention = by_window(maps, model.window(model.sample_size))  # (B, G, n, J)
            losses = by_window(loss[:, None], model.window(model.sample_size))[..., 0]  # (B, G, n)
            correlations.append(rank_correlation(attention.sum(-1), losses).mean(1))  # (B,)
            entropies.append(
                -(attention * attention.clamp(min=1e-30).log()).sum(2).mean(1) / math.log(attention.shape[2])
            )
        correlation, entropy = torch.stack(correlations).mean(0), torch.stack(entropies).mean(0)  # (B,), (B, J)
        fall = entropy[:, :ENDS].mean(1) - entropy[:, -ENDS:].mean(1)
        for name, values in (("attention and loss, rank correlation", correlation), ("fall of entropy", fall)):
            error = values.std().item() / len(values) ** 0.5
            study.row(name, seed, {"value": values.mean().item(), "error": error})
        for latent, value in enumerate(entropy.mean(0).tolist()):
            study.row(f"entropy of latent {latent}", seed, {"value": value})
        for time, values in zip(TIMES, correlations, strict=True):
            study.row(f"attention and loss at t = {time}", seed, {"value": values.mean().item()})
    for says, name in (
        ("attention and loss have a positive rank correlation inside windows", "attention and loss, rank correlation"),
        ("the first 4 latents attend more evenly than the last 4", "fall of entropy"),
    ):
        rows = [study.last(name, seed) for seed in study.seeds]
        advantages, errors = [row["value"] for row in rows], [row["error"] for row in rows]
        decided = verdict(advantages, errors)
        study.parts.append({"says": says, "advantages": advantages, "errors": errors, "verdict": decided})
    study.write(f"multi-budget ELIT, all latents, {count} test pictures")


if __name__ == "__main__":
    main()
