"""The model card that a sweep writes: README.md with the Hub's metadata, then budget, quality and cost."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from elit.evaluate.plane import Point, best
from elit.evaluate.plots import LOOK, at_best_scale
from elit.evaluate.report.sweep import cells, command, describe, headings, other_metrics
from elit.files import write_text
from elit.models.transformer import Transformer

MARK = "<!-- written by elit sweep; remove this line to keep the card as it is -->"
PAPER = "arxiv:2603.12245"


def write_card(
    folder: Path,
    model: Transformer,
    points: Sequence[Point],
    metric: str,
    *,
    reference: str,
    license: str,
    datasets: Sequence[str] = (),
    instead: Path,
) -> Path:
    """Writes FOLDER/README.md, or `instead` where FOLDER has a README.md that no sweep wrote; returns the path.

    points: of one detector. The Hub's results are `metric` of the rows with the most steps, and all metrics of the best
    row. reference: the data set of the results. license, datasets: as the Hub names them.
    """
    card = folder / "README.md"
    if card.is_file() and MARK not in card.read_text(encoding="utf-8"):
        card = instead
    rows = card_points(points, metric)
    metrics = [metric, *other_metrics(points[0], metric)]
    top, steps = best(rows, metric), max(row.steps for row in rows)
    name = f"ELIT-{type(model).__name__}" if model.budgets else type(model).__name__
    task = pipeline_tag(model)
    data = ModelCardData(
        license=license,
        library_name="elit",
        pipeline_tag=task,
        tags=["elit", "diffusers", "diffusion", "rectified-flow", "elastic-inference", PAPER],
        datasets=list(datasets) or None,
        metrics=metrics,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=task or "image-generation",
                dataset_type=reference,
                dataset_name=reference,
                metric_type=each,
                metric_value=round(point.scores[each], 6),
                metric_name=f"{each} ({describe(point)}, {point.gflops:.4g} GFLOPs)",
            )
            for point in rows
            if point.steps == steps or point is top
            for each in (metrics if point is top else [metric])
        ],
    )
    write_text(card, f"---\n{data.to_yaml()}\n---\n\n{_body(name, model, rows, metrics, reference)}")
    ModelCard.load(card)  # raises where the card does not read back
    return card


def card_points(points: Sequence[Point], metric: str) -> list[Point]:
    """The card's table: without guidance and with each kind at its best scale, from the most steps to the fewest."""
    of_kinds = [point for kind in LOOK for point in at_best_scale(points, metric, kind)]
    return sorted(of_kinds, key=lambda point: -point.steps)


def pipeline_tag(model: Transformer) -> str | None:
    """The Hub's name for the task; it has none for clips by class."""
    clips = len(model.sample_size) == 3
    if model.takes_text:
        return "text-to-video" if clips else "text-to-image"
    return None if clips else "unconditional-image-generation"


def _body(name: str, model: Transformer, rows: Sequence[Point], metrics: Sequence[str], reference: str) -> str:
    top, budgets, channels = best(rows, metrics[0]), model.budgets, model.config.in_channels
    dial = (
        f"It runs at {len(budgets)} budgets with the same weights: {budgets[0]} to {budgets[-1]} latents per group, "
        "chosen at inference, by the Elastic Latent Interface Transformer."
        if budgets
        else "It is a plain network without a latent interface."
    )
    size = f"{'×'.join(map(str, model.sample_size))} with {channels} channel{'s' if channels > 1 else ''}"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    table = [headings(metrics), tuple("---:" for _ in headings(metrics)), *(cells(point, metrics) for point in rows)]
    lines = "\n".join("| " + " | ".join(row) + " |" for row in table)
    return f"""{MARK}
# {name}

A diffusion transformer trained with rectified flow: {parameters:,} parameters, samples of {size}.
{dial}

```bash
{command(top, Path("."))}   # in this folder: the best row below
```

## Budget, quality, cost

{lines}

GFLOPs (a multiply-add is 2) and milliseconds are those of a whole sample, all steps and guidance included,
without the autoencoder; milliseconds were measured on one machine. {top.count} samples a row, scored by
`{top.detector}` against `{reference}`; each kind of guidance at its best scale. Every number has its
full recipe in the sweep's folder.
"""
