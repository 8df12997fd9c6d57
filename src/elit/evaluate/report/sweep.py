"""The page of a sweep: its pictures, what they say in numbers, and every point with its recipe."""

from collections.abc import Sequence
from pathlib import Path

from elit.evaluate import plots
from elit.evaluate.plane import Point, best, degradations, front_of
from elit.evaluate.plots import LOOK, at_best_scale, budgets_of, latents
from elit.evaluate.report.html import Section, write_page


def write_sweep_report(
    out: Path, points: Sequence[Point], metric: str, *, model: Path, grey: bool, table: Path
) -> Path:
    """OUT/report.html and its pictures, of the points of one detector that have `metric`. Returns the page's path."""
    sections = [_plane(out, points, metric), _front_table(points, metric, model)]
    plain = [point for point in points if not point.cache]
    if len({point.budget for point in plain}) > 1:
        sections.append(_tokens_or_steps(out, plain, metric))
    if {point.guidance for point in plain} - {"none"}:
        sections.append(_guidance(out, plain, metric))
    if len(plain) < len(points):
        sections.append(_caching(out, points, metric))
    if len({point.budget for point, _ in degradations(plain, metric)}) > 1:
        sections.append(_degradation(out, plain, metric))
    sections += [_saturation(out, plain, grey), _all_points(points, metric, table)]
    top = best(points, metric)
    lead = (
        f"{model} at {len(points)} settings, {points[0].count} samples each, scored by {top.detector}. Best {metric}: "
        f"{top.scores[metric]:.4g} with {describe(top)}, for {top.gflops:.3g} GFLOPs and {top.ms:.3g} ms a sample."
    )
    page = out / "report.html"
    write_page(page, f"Compute against {metric.upper() if len(metric) < 4 else metric}", lead, sections)
    return page


def describe(point: Point) -> str:
    """A setting in words: "8 latents per group, 16 steps, CCFG at scale 2"."""
    tokens = "all tokens" if point.budget == "all" else f"{latents(point)} per group"
    guided = "no guidance" if point.guidance == "none" else f"{LOOK[point.guidance][0]} at scale {point.scale:g}"
    cached = f", cache {point.cache:g}" if point.cache else ""
    return f"{tokens}, {point.steps} steps, {guided}{cached}"


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


def _plane(out: Path, points: Sequence[Point], metric: str) -> Section:
    plots.compute_quality(points, metric, out / "compute_quality.png")
    return Section(
        title="Quality against compute",
        text="Every point is one setting; GFLOPs and milliseconds are those of a whole sample, all steps and guidance "
        "included, without the autoencoder. The line is the Pareto front: no other setting is as good for less.",
        image=out / "compute_quality.png",
        alt=f"{metric} against GFLOPs and milliseconds, with the Pareto front",
    )


def _front_table(points: Sequence[Point], metric: str, model: Path) -> Section:
    by_flops, by_ms = (front_of(points, metric, cost) for cost in ("gflops", "ms"))
    either = sorted({id(p): p for p in (*by_flops, *by_ms)}.values(), key=lambda point: point.gflops)
    rows = [
        (*cells(point, [metric]), "yes" if point in by_flops else "", "yes" if point in by_ms else "", point.file)
        for point in either
    ]
    return Section(
        title="The front",
        text="Settings that no other one beats in GFLOPs or in milliseconds. The command samples the best of them.",
        headings=(*headings([metric]), "in GFLOPs", "in ms", "recipe"),
        rows=rows,
        code=command(best(points, metric), model),
    )


def command(point: Point, model: Path) -> str:
    """How to sample at a point."""
    parts = ["elit sample", str(model), f"--steps {point.steps}"]
    if point.budget.isdigit() or "@" in point.budget:
        parts.append(f"--budget {point.budget}")
    if point.guidance != "none":
        parts.append(f"--guidance {point.guidance} --scale {point.scale:g}")
    if point.guidance_budget is not None:
        parts.append(f"--guidance-budget {point.guidance_budget}")
    if point.cache:
        parts.append(f"--cache {point.cache:g}")
    return " ".join(parts)


def _tokens_or_steps(out: Path, points: Sequence[Point], metric: str) -> Section:
    plots.tokens_or_steps(points, metric, out / "tokens_or_steps.png")
    return Section(
        title="Fewer tokens or fewer steps",
        text="Each line is a number of steps, the numbers along it latents per group; every kind of guidance at the "
        "scale of its best point. Where lines cross, fewer latents with more steps cost as much as the other way. "
        "Stars are schedules.",
        image=out / "tokens_or_steps.png",
        alt=f"{metric} against GFLOPs, a line a number of steps",
    )


def _caching(out: Path, points: Sequence[Point], metric: str) -> Section:
    plots.caching_curves(points, metric, out / "caching.png")
    return Section(
        title="Step caching",
        text="A step reuses the last output while the time embedding has moved by less than a threshold since then. "
        "Each line is one setting at rising thresholds, from none on the left; to the right the network is asked less.",
        image=out / "caching.png",
        alt=f"{metric} against the share of network calls saved",
    )


def _guidance(out: Path, points: Sequence[Point], metric: str) -> Section:
    plots.guidance_curves(points, metric, out / "guidance.png")
    weak = sorted({point.guidance_budget for point in points if point.guidance_budget is not None})
    second = f" The second branch of AG and CCFG keeps {' or '.join(map(str, weak))} per group." if weak else ""
    return Section(
        title="Guidance",
        text="Quality against guidance scale; 1 is off, and all kinds start there. CFG drops the class in its second "
        f"branch, AG lowers its budget, CCFG does both.{second}",
        image=out / "guidance.png",
        alt=f"{metric} against guidance scale, a panel a budget",
    )


def _degradation(out: Path, points: Sequence[Point], metric: str) -> Section:
    plots.degradation_curves(points, metric, out / "degradation.png")
    most = max(point.steps for point in points)
    kinds = [kind for kind in LOOK if at_best_scale(points, metric, kind)]
    correlations = {(p.budget, p.guidance, p.scale): rho for p, rho in degradations(points, metric) if p.steps == most}
    scales = {kind: at_best_scale(points, metric, kind)[0].scale for kind in kinds}
    rows = []
    for budget in budgets_of(points):
        ratios = [correlations.get((budget, kind, scales[kind])) for kind in kinds]
        rows.append((budget, *("" if rho is None else f"{rho:.3f}" for rho in ratios)))
    return Section(
        title="What smaller budgets lose",
        text="ρ is the score at a budget over the score with all latents for a distance, and its inverse for a metric "
        f"that rises with quality: 1 is no loss, 2 twice as bad. The table is at {most} steps.",
        image=out / "degradation.png",
        alt="Degradation ratio against the share of the latents",
        headings=("latents", *(LOOK[kind][0] for kind in kinds)),
        rows=rows,
    )


def _saturation(out: Path, points: Sequence[Point], grey: bool) -> Section:
    plots.saturation_curves(points, out / "saturation.png", grey=grey)
    what = (
        "Contrast of the samples: the mean of |pixel − the picture's mean| over half of the range. Grey pictures have "
        "no saturation."
        if grey
        else "Mean saturation of the samples' pixels, (max − min) / max over the channels."
    )
    return Section(
        title="Contrast" if grey else "Saturation",
        text=f"{what} What is overdone by guidance shows here as a rise.",
        image=out / "saturation.png",
        alt="Saturation against guidance scale, a panel a budget",
    )


def _all_points(points: Sequence[Point], metric: str, table: Path) -> Section:
    metrics = [metric, *(name for name in points[0].scores if name != metric and not name.endswith("_std"))]
    return Section(
        title="All points",
        text=f"As in {table.name}, with the file of each score: in it stands everything that decides it, and the "
        "SHA-256 of the samples.",
        headings=(*headings(metrics), "recipe"),
        rows=[(*cells(point, metrics), point.file) for point in points],
    )
