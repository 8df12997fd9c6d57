"""Self-contained pages: pictures inside, no script; a sweep's, and its model card, README.md."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from elit.evaluate import plots
from elit.evaluate.plots import LOOK, at_best_scale
from elit.evaluate.sweep import Point, best, degradations, front_of
from elit.evaluate.tables import markdown_table, template
from elit.files import write_text
from elit.models.transformer import Transformer

PAGE, CARD = (template(name) for name in ("page.html", "card.md"))
MARK = "<!-- written by elit sweep; remove this line to keep the card as it is -->"


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph and, where given, a picture or a table."""

    title: str
    text: str
    image: Path | None = None
    headings: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def write_page(path: Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Writes one HTML file with everything in it."""
    parts: list[str] = []
    for section in sections:
        parts += [f"<h2>{escape(section.title)}</h2>", f"<p>{escape(section.text)}</p>"]
        if section.image:
            data = base64.b64encode(section.image.read_bytes()).decode()
            kind = section.image.suffix.removeprefix(".")
            parts.append(f'<img alt="{escape(section.title)}" src="data:image/{kind};base64,{data}">')
        if section.rows:
            head = "".join(f"<th>{escape(cell)}</th>" for cell in section.headings)
            rows = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>\n" for row in section.rows)
            parts.append(f'<div class="scroll"><table>\n<tr>{head}</tr>\n{rows}</table></div>')
    filled = PAGE.substitute(title=escape(title), lead=escape(lead), body="\n".join(parts))
    write_text(path, filled)


def write_sweep_report(out: Path, points: Sequence[Point], metric: str, *, model: Path, grey: bool) -> Path:
    """OUT/report.html and its pictures, of the points of one detector that have `metric`. Returns the page's path."""
    plain = [point for point in points if not point.cache]
    metrics = [metric, *other_metrics(points[0], metric)]
    top, front = best(points, metric), front_of(points, metric, "gflops")
    plots.compute_quality(points, metric, out / "compute_quality.png")
    text = "GFLOPs and milliseconds are those of a whole sample, guidance included, without the autoencoder."
    sections = [Section("Quality against compute", text, out / "compute_quality.png")]
    text = f"Settings that no other one beats in GFLOPs. The best of all: {command(top, model)}"
    rows = [(*cells(point, [metric]), point.file) for point in front]
    sections.append(Section("The front", text, headings=(*headings([metric]), "recipe"), rows=rows))
    if any(point.guidance != "none" for point in plain):
        plots.over_scales(plain, plots.quality_label(metric), out / "guidance.png", metric)
        sections.append(Section("Guidance", "Quality against guidance scale; 1 is off.", out / "guidance.png"))
    if len({point.budget for point, _ in degradations(plain, metric)}) > 1:
        plots.degradation_curves(plain, metric, out / "degradation.png")
        text = "ρ is the score over that of all latents, inverted where higher is better: 1 is no loss, 2 twice as bad."
        sections.append(Section("The loss of smaller budgets", text, out / "degradation.png"))
    measure = "contrast" if grey else "saturation"
    plots.over_scales(plain, f"mean {measure}", out / "saturation.png")
    sections.append(Section(measure.capitalize(), "Too much guidance shows here as a rise.", out / "saturation.png"))
    rows = [(*cells(point, metrics), point.file) for point in points]
    text = "With the file of each score, which holds everything that decides it."
    sections.append(Section("All points", text, headings=(*headings(metrics), "recipe"), rows=rows))
    lead = f"{model} at {len(points)} settings, {points[0].count} samples each, scored by {top.detector}. "
    lead += f"Best {metric}: {top.scores[metric]:.4g} with {top.sampling.describe()} "
    lead += f"({top.gflops:.3g} GFLOPs, {top.ms:.3g} ms a sample)."
    write_page(out / "report.html", f"Compute against {plots.quality_label(metric)}", lead, sections)
    return out / "report.html"


def other_metrics(point: Point, metric: str) -> list[str]:
    return [name for name in point.scores if name != metric and not name.endswith("_std")]


def cells(point: Point, metrics: Sequence[str]) -> tuple[str, ...]:
    """A point as the columns of `headings`."""
    return (
        point.budget,
        f"{100 * point.share:.3g}%",
        f"{point.calls} of {point.steps}" if point.cache else str(point.steps),
        "none" if point.guidance == "none" else LOOK[point.guidance][0],
        "" if point.guidance == "none" else f"{point.scale:g}",
        f"{point.gflops:.3f}",
        f"{point.ms:.2f}",
        *(f"{point.scores[metric]:.4g}" for metric in metrics),
    )


def headings(metrics: Sequence[str]) -> tuple[str, ...]:
    return ("latents", "share", "steps", "guidance", "scale", "GFLOPs", "ms", *metrics)


def command(point: Point, model: Path) -> str:
    """The command that samples at a point."""
    parts = ["elit sample", str(model), f"--steps {point.steps}"]
    if point.budget.isdigit() or "@" in point.budget:
        parts.append(f"--budget {point.budget}")
    if point.guidance != "none":
        parts.append(f"--guidance {point.guidance} --scale {point.scale:g}")
    if (point.guidance_low, point.guidance_high) != (0, 1):
        parts.append(f"--guidance-interval {point.guidance_low:g} {point.guidance_high:g}")
    defaults = {"guidance_budget": None, "solver": "euler", "shift": 1.0, "cache": 0.0}
    given = {name: getattr(point, name) for name, default in defaults.items() if getattr(point, name) != default}
    parts += [f"--{name.replace('_', '-')} {value}" for name, value in given.items()]
    return " ".join(parts)


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
    """Writes FOLDER/README.md, or `instead` where FOLDER has a README.md that no sweep wrote; returns the path."""
    card = folder / "README.md"
    if card.is_file() and MARK not in card.read_text(encoding="utf-8"):
        card = instead
    rows = card_points(points, metric)
    metrics = [metric, *other_metrics(points[0], metric)]
    top, steps = best(rows, metric), max(row.steps for row in rows)
    budgets, channels, task = model.budgets, model.config.in_channels, pipeline_tag(model)
    name = f"ELIT-{type(model).__name__}" if budgets else type(model).__name__
    data = ModelCardData(
        license=license,
        library_name="elit",
        pipeline_tag=task,
        tags=["elit", "diffusers", "diffusion", "rectified-flow", "elastic-inference", "arxiv:2603.12245"],
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
                metric_name=f"{each} ({point.sampling.describe()}, {point.gflops:.4g} GFLOPs)",
            )
            for point in rows
            if point.steps == steps or point is top
            for each in (metrics if point is top else [metric])
        ],
    )
    dial = f"one of {len(budgets)} budgets, chosen at inference" if budgets else "no latent interface"
    size = f"{'×'.join(map(str, model.sample_size))} with {channels} channel{'s' if channels > 1 else ''}"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    values = {"mark": MARK, "data": data.to_yaml(), "name": name, "size": size, "dial": dial, "reference": reference}
    values |= {"parameters": f"{parameters:,}", "command": command(top, Path(".")), "count": top.count}
    values["table"] = markdown_table(headings(metrics), [cells(point, metrics) for point in rows])
    write_text(card, CARD.substitute(values, detector=top.detector))
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
