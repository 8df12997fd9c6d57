"""The worth of a distilled pipeline at each budget: pictures beside the original's, and distances to it."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from elit.elastic.context import UNSET, budget, original
from elit.elastic.cost import count_block_flops
from elit.elastic.distill_objectives import mean_square
from elit.elastic.families import family_of
from elit.elastic.families.family import Pipeline
from elit.elastic.pipelines import Requests
from elit.elastic.recorded_calls import CallBatch
from elit.elastic.recording import output_tensor
from elit.elastic.trees import Arguments
from elit.sampling.pictures import image_grid

ROWS, TIMES = 32, 5
Row = dict[str, Any]
"""Distances at one budget, by name."""


def validated_budgets(budgets: Sequence[int]) -> list[int]:
    """All, a half, a quarter and an eighth of a window's tokens."""
    return list(dict.fromkeys(max(1, round(budgets[-1] * share)) for share in (1.0, 0.5, 0.25, 0.125)))


class Validation:
    """Fixed prompts and seeds, and fixed calls: the same each time it measures.

    teacher, call: the original's predictions for a call. `draw_reference` before training, then `measure`.
    """

    def __init__(self, pipe: Pipeline, requests: Requests, teacher: Tensor, call: CallBatch):
        self.pipe, self.requests, self.teacher, self.call = pipe, requests, teacher, call
        self.family, self.full = family_of(pipe.transformer), pipe.transformer.budgets[-1]

    def draw_reference(self) -> None:
        """The original's own samples."""
        with torch.no_grad(), original():
            self.reference = self.samples()

    def measure(self) -> tuple[Image.Image | None, list[Row]]:
        """A picture, a row a budget below the original's, and a table; no picture where samples are none."""
        rows, table = [self.reference], []
        with torch.no_grad():
            for count in validated_budgets(self.pipe.transformer.budgets):
                row: Row = {"tokens": count, "share": count / self.full, **self.distances(count)}
                for name, weak in (("", UNSET), ("_ccfg", 1))[: 1 + self.requests.guided]:
                    with budget(count, guidance=weak):
                        rows.append(self.samples())
                    difference = rows[-1].float() - self.reference.float()
                    row[f"picture_distance{name}"] = difference.square().mean().sqrt().item()
                table.append(row)
        pictures = torch.cat(rows)
        if pictures.ndim != 4 or pictures.shape[1] not in (1, 3):
            return None, table
        scale = max(1, 64 // pictures.shape[-2])
        return image_grid(pictures.float().cpu() * 2 - 1, len(self.reference), scale=scale), table

    def samples(self) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] by the pipeline; of a clip its first frame."""
        output = self.pipe(**self.requests.validation(output_type="pt"))
        samples = torch.as_tensor(output.images if hasattr(output, "images") else output.frames)
        samples = samples[:, 0] if samples.ndim == 5 else samples
        return samples[:, :3]  # Qwen-Image 2.1 has a fourth channel, of transparency

    def distances(self, count: int) -> Row:
        """Root mean squared distance of the prediction to the original's, over all calls and by t."""
        with budget(count, doubled=False):
            predicted = output_tensor(self.pipe.transformer(**self.call.arguments))
        squared = mean_square(predicted.float() - self.teacher.float())
        t = (1 - self.family.noise(self.call.arguments).float()).expand(len(squared)).clamp(0, 1)
        bucket = (t * TIMES).long().clamp(max=TIMES - 1)
        by_time = [squared[bucket == i] for i in range(TIMES)]
        return {
            "distance": squared.mean().sqrt().item(),
            "distance_by_t": [part.mean().sqrt().item() if len(part) else None for part in by_time],
        }

    def flops(self, passes: int, *, teacher: bool) -> dict[int | None, int]:
        """Of a sample's training step at each budget, embedders and output layers left out.

        passes: as many forwards as it costs. teacher: the original runs in it too.
        """
        transformer, call = self.pipe.transformer, self.call.arguments
        sizes: Arguments = {
            "tokens": self.family.grids(transformer, call),
            "text_tokens": self.family.text(transformer, call),
        }
        beside = count_block_flops(transformer, **sizes, interface=False) if teacher else 0
        return {
            count: beside + passes * count_block_flops(transformer, **sizes, budget=count)
            for count in transformer.budgets
        }
