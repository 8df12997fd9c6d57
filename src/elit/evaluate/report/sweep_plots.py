"""Pictures of a sweep: the compute–quality plane and its front, guidance, what smaller budgets lose, saturation."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from elit.evaluate.plane import Point, best, degradations, front_of
from elit.evaluate.plots import BLUE, GREY, ORANGE, STYLE, save_figure
from elit.evaluate.score import DISTANCES

LOOK = {
    "none": ("no guidance", BLUE, "o"),
    "cfg": ("CFG", "#1f9d6b", "^"),
    "ag": ("AG", "#8a4fb0", "D"),
    "ccfg": ("CCFG", ORANGE, "s"),
}
COSTS = (("gflops", "GFLOPs per sample"), ("ms", "ms per sample (measured)"))
SHAPES = "osD^vPX*"  # of step counts
MOST_PANELS = 6
DARK = "#1d2939"


def quality_label(metric: str) -> str:
    return f"{metric.upper() if len(metric) < 4 else metric} ({'lower' if metric in DISTANCES else 'higher'} is better)"


def compute_quality(points: Sequence[Point], metric: str, path: Path, costs: Sequence[tuple[str, str]] = COSTS) -> None:
    """Quality against each of `costs`, all points and their Pareto front (paper Figures 1, 8, 14)."""
    steps = sorted({point.steps for point in points})
    shapes = {count: SHAPES[i % len(SHAPES)] for i, count in enumerate(steps)}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(0.75 + 4.9 * len(costs), 5.6), dpi=130, layout="constrained")
        axes = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
        for ax, (cost, label) in zip(axes, costs, strict=True):
            front = front_of(points, metric, cost)
            at = [(getattr(point, cost), point.scores[metric]) for point in front]
            ax.plot(*zip(*at, strict=True), color=DARK, linewidth=1.2, zorder=1, drawstyle="steps-post")
            for point in points:
                on = point in front
                ax.scatter(
                    getattr(point, cost),
                    point.scores[metric],
                    s=52 if on else 26,
                    marker=shapes[point.steps],
                    color=LOOK[point.guidance][1],
                    alpha=1 if on else 0.4,
                    edgecolors=DARK if on else "none",
                    zorder=3 if on else 2,
                )
            _name_points(ax, front, at, metric)
            _log(ax.xaxis, ax.set_xscale, [getattr(point, cost) for point in points])
            _quality_axis(ax, metric, [point.scores[metric] for point in points])
            ax.set(xlabel=label)
            ax.grid(alpha=0.25)
        figure.axes[0].set_ylabel(quality_label(metric))
        kinds = [kind for kind in LOOK if any(point.guidance == kind for point in points)]
        keys = [_key(LOOK[kind][0], color=LOOK[kind][1], marker="o") for kind in kinds]
        keys += [_key(f"{count} steps", color=GREY, marker=shapes[count]) for count in steps]
        keys.append(Line2D([], [], color=DARK, linewidth=1.2, label="Pareto front (latents per group)"))
        columns = min(len(keys), 4 * len(costs))
        figure.legend(handles=keys, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
        save_figure(figure, path)


def tokens_or_steps(points: Sequence[Point], metric: str, path: Path) -> None:
    """A line a step count along the budgets, a panel a kind of guidance: tokens or steps (Figures 8, 14)."""
    kinds = [kind for kind in LOOK if any(point.guidance == kind for point in points)]
    steps = sorted({point.steps for point in points})
    colours = mpl.colormaps["viridis"].resampled(256)
    with mpl.rc_context(STYLE):
        figure, axes = _panels(len(kinds), 3.4)
        for ax, kind in zip(axes, kinds, strict=True):
            points_of_kind = at_best_scale(points, metric, kind)
            for i, count in enumerate(steps):
                line = sorted(
                    (point for point in points_of_kind if point.steps == count), key=lambda point: point.gflops
                )
                at = [(point.gflops, point.scores[metric]) for point in line if not point.scheduled]
                stars = [(point.gflops, point.scores[metric]) for point in line if point.scheduled]
                look: dict[str, Any] = {"color": colours(0.85 * i / max(1, len(steps) - 1))}
                label = f"{count} step{'s' if count > 1 else ''}"
                if at:
                    ax.plot(*zip(*at, strict=True), **look, marker="o", markersize=4.5, label=label)
                if stars:
                    ax.plot(*zip(*stars, strict=True), "*", **look, markersize=10)
                if i in (0, len(steps) - 1):  # lines often run close together: the outer ones say what their points are
                    offset, side = (
                        ((-3, -4), ("right", "top")) if i == 0 and len(steps) > 1 else ((3, 3), ("left", "bottom"))
                    )
                    names = [point.budget for point in line if not point.scheduled]
                    for name, place in zip(names, at, strict=True):
                        ax.annotate(
                            name,
                            place,
                            xytext=offset,
                            textcoords="offset points",
                            ha=side[0],
                            va=side[1],
                            **look,
                            size=8,
                        )
            _log(ax.xaxis, ax.set_xscale, [point.gflops for point in points])
            _quality_axis(ax, metric, [point.scores[metric] for point in points])
            ax.set(xlabel=COSTS[0][1], title=_titled(kind, points_of_kind))
            ax.grid(alpha=0.25)
        figure.supylabel(quality_label(metric), fontsize=11)
        axes[0].legend(frameon=False, fontsize=9)
        save_figure(figure, path)


def guidance_curves(points: Sequence[Point], metric: str, path: Path) -> None:
    """Quality against guidance scale, a line a kind with its cost, a panel a budget (paper Figure 5)."""
    _over_scales(points, lambda point: point.scores[metric], quality_label(metric), path, metric=metric)


def caching_curves(points: Sequence[Point], metric: str, path: Path) -> None:
    """Quality against the share of network calls that step caching saves: a line a budget, a panel a kind and steps."""
    kinds = [kind for kind in LOOK if any(point.guidance == kind for point in points)]
    panels = [(kind, count) for kind in kinds for count in sorted({point.steps for point in points})]
    budgets = _spread(budgets_of(points))
    colours = mpl.colormaps["viridis"].resampled(256)
    with mpl.rc_context(STYLE):
        figure, axes = _panels(len(panels), 3.4, share=False)  # guided scores may be far from the others
        for ax, (kind, count) in zip(axes, panels, strict=True):
            same_steps = [point for point in at_best_scale(points, metric, kind) if point.steps == count]
            for i, budget in enumerate(budgets):
                line = sorted((p for p in same_steps if p.budget == budget), key=lambda point: point.cache)
                at = [(100 * (1 - (p.calls or p.steps) / p.steps), p.scores[metric]) for p in line]
                if at:
                    colour = colours(0.85 * i / max(1, len(budgets) - 1))
                    ax.plot(*zip(*at, strict=True), color=colour, marker="o", markersize=4.5, label=latents(line[0]))
            if metric in DISTANCES and same_steps:  # from 0, so that a change is seen beside the score itself
                ax.set_ylim(0, 1.1 * max(point.scores[metric] for point in same_steps))
            ax.set(xlabel="% of calls saved", title=f"{_titled(kind, same_steps)}, {count} steps" if same_steps else "")
            ax.grid(alpha=0.25)
        figure.supylabel(quality_label(metric), fontsize=11)
        axes[0].legend(frameon=False, fontsize=9)
        save_figure(figure, path)


def saturation_curves(points: Sequence[Point], path: Path, *, grey: bool) -> None:
    """Mean saturation of the samples, of grey ones their contrast, against guidance scale (paper Figure 15)."""
    _over_scales(points, lambda point: point.saturation, "mean contrast" if grey else "mean saturation", path)


def degradation_curves(points: Sequence[Point], metric: str, path: Path) -> None:
    """ρ against the share of the latents, a line a kind at its best scale, a panel a step count (paper Table 5)."""
    steps = sorted({point.steps for point in points})[-MOST_PANELS:]
    ratios = degradations(points, metric)
    shares = sorted({point.share for point, _ in ratios if not point.scheduled})
    with mpl.rc_context(STYLE):
        figure, axes = _panels(len(steps), 3.4)
        for ax, count in zip(axes, steps, strict=True):
            ax.axhline(1, color=GREY, linewidth=1, linestyle="--")
            for kind, (name, colour, marker) in LOOK.items():
                points_of_kind = at_best_scale(points, metric, kind)
                here = [(point, rho) for point, rho in ratios if point in points_of_kind and point.steps == count]
                line = sorted((point.share, rho) for point, rho in here if not point.scheduled)
                stars = [(point.share, rho) for point, rho in here if point.scheduled]
                if line:
                    ax.plot(*zip(*line, strict=True), color=colour, marker=marker, markersize=5, label=name)
                if stars:
                    ax.plot(*zip(*stars, strict=True), "*", color=colour, markersize=10)
            _log(ax.yaxis, ax.set_yscale, [rho for _, rho in ratios])
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_locator(FixedLocator(shares))
            ax.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
            ax.xaxis.set_minor_locator(NullLocator())
            if len(shares) > 5:
                ax.tick_params(axis="x", rotation=60)
            ax.set(xlabel="share of the latents", title=f"{count} step{'s' if count > 1 else ''}")
            ax.grid(alpha=0.25)
        figure.supylabel("degradation ratio ρ (1: no loss)", fontsize=11)
        axes[0].legend(frameon=False, fontsize=9)
        save_figure(figure, path)


def at_best_scale(points: Sequence[Point], metric: str, kind: str) -> list[Point]:
    """The points of a kind of guidance at the scale of its best point; all of them without guidance."""
    of_kind = [point for point in points if point.guidance == kind]
    return [p for p in of_kind if p.scale == best(of_kind, metric).scale] if of_kind else []


def budgets_of(points: Sequence[Point]) -> list[str]:
    """Budgets and schedules as they are called, by falling share of the latents."""
    return list(dict.fromkeys(point.budget for point in sorted(points, key=lambda point: -point.share)))


def latents(point: Point) -> str:
    """What a point keeps of every group, in words."""
    if point.scheduled:
        return f"latents {point.budget}"
    return f"{point.budget} latent{'s' if point.budget != '1' else ''}"


def _over_scales(
    points: Sequence[Point], value: Callable[[Point], float], label: str, path: Path, *, metric: str | None = None
) -> None:
    """At most steps; every kind's line starts without guidance, at scale 1. The legend has costs at the last scale."""
    most = max(point.steps for point in points)
    at_most = [point for point in points if point.steps == most]
    budgets = _spread(budgets_of(at_most))
    with mpl.rc_context(STYLE):
        figure, axes = _panels(len(budgets), 4.2, share=metric is None)  # a poor budget must not flatten the others
        for ax, budget in zip(axes, budgets, strict=True):
            here = [point for point in at_most if point.budget == budget]
            plain = [point for point in here if point.guidance == "none"]
            for point in plain:
                ax.axhline(value(point), color=BLUE, linewidth=1, linestyle=":")
                ax.plot(1, value(point), "o", color=BLUE, label=f"none: {point.gflops:.3g} GFLOPs", zorder=3)
            for kind, (name, colour, marker) in LOOK.items():
                line = sorted((point for point in here if point.guidance == kind), key=lambda point: point.scale)
                if kind == "none" or not line:
                    continue
                start = [(1.0, value(point)) for point in plain]
                at = sorted(start + [(point.scale, value(point)) for point in line])
                named = f"{name}: {line[-1].gflops:.3g} GFLOPs"
                ax.plot(*zip(*at, strict=True), color=colour, marker=marker, markersize=5, label=named)
            if metric:
                _quality_axis(ax, metric, [value(point) for point in here])
            share = "" if budget == "all" else f" ({100 * here[0].share:.3g}%)"
            title = "all tokens" if budget == "all" else (budget if here[0].scheduled else latents(here[0]))
            ax.set_xlabel("guidance scale")
            ax.set_title(title + share, fontsize=11 if len(title) < 16 else 8)
            ax.grid(alpha=0.25)
            ax.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.2))
        figure.supylabel(f"{label}, {most} steps", fontsize=11)
        save_figure(figure, path)


def _panels(count: int, height: float, *, share: bool = True) -> tuple[Figure, list[Axes]]:
    """So many axes, at most three a row, so that a page that is shown smaller stays legible. share: one y axis."""
    columns = 2 if count in (2, 4) else min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(3.3 * columns + 0.6, height * rows), dpi=130, layout="constrained")
    axes = list(figure.subplots(rows, columns, sharey=share, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _name_points(ax: Axes, front: Sequence[Point], at: Sequence[tuple[float, float]], metric: str) -> None:
    """The budgets of points on the front, beneath the line for distances and above it for what rises."""
    below = metric in DISTANCES
    for point, place in zip(front, at, strict=True):
        offset, side = ((-3, -5), "top") if below else ((-3, 5), "bottom")
        ax.annotate(
            "sched." if point.scheduled else point.budget,
            place,
            xytext=offset,
            textcoords="offset points",
            ha="right",
            va=side,
            fontsize=8,
            color=LOOK[point.guidance][1],
        )


def _quality_axis(ax: Axes, metric: str, values: Sequence[float]) -> None:
    if metric in DISTANCES:
        _log(ax.yaxis, ax.set_yscale, values)


def _log(axis: mpl.axis.Axis, set_scale: Callable[[str], None], values: Sequence[float]) -> None:
    """Logarithmic where values span more than a factor of 3, with plain numbers on the axis."""
    if min(values) <= 0 or max(values) < 3 * min(values):
        return
    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _titled(kind: str, points: Sequence[Point]) -> str:
    return LOOK[kind][0] + (f", scale {points[0].scale:g}" if kind != "none" else "")


def _spread(values: Sequence[str]) -> list[str]:
    """At most `MOST_PANELS` of them, evenly spaced, first and last among them."""
    if len(values) <= MOST_PANELS:
        return list(values)
    return [values[round(i * (len(values) - 1) / (MOST_PANELS - 1))] for i in range(MOST_PANELS)]


def _key(label: str, **look: Any) -> Line2D:
    return Line2D([], [], linestyle="none", label=label, **look)
