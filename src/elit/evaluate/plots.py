"""Curves of quality against cost, guidance and smaller budgets; sheets of pictures and of Read's attention."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, StrMethodFormatter
from torch import Tensor

from elit.budgets import evenly_spaced
from elit.evaluate.metrics import METRICS
from elit.evaluate.sweep import Point, best, degradations, front_of
from elit.files import replacing
from elit.sampling.pictures import as_pictures, to_uint8

BLUE, ORANGE, GREY, DARK = "#2563a8", "#d9822b", "#667085", "#1d2939"
LOOK = {
    "none": ("no guidance", BLUE, "o"),
    "cfg": ("CFG", "#1f9d6b", "^"),
    "ag": ("AG", "#8a4fb0", "D"),
    "ccfg": ("CCFG", ORANGE, "s"),
}
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY}
COSTS = (("gflops", "GFLOPs per sample"), ("ms", "ms per sample (measured)"))
SHAPES = "osD^vPX*"  # of step counts
MAX_PANELS = 6


@contextmanager
def new_figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of that many inches; written as a PNG at the end of the block."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
        yield figure
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")


def compute_quality(
    points: Sequence[Point],
    metric: str,
    path: Path,
    costs: Sequence[tuple[str, str]] = COSTS,
    present: tuple[float, float | None] | None = None,
) -> None:
    """Quality against each of `costs`, all points and their Pareto front (paper Figures 1, 8, 14)."""
    steps = sorted({point.steps for point in points})
    shapes = {count: SHAPES[i % len(SHAPES)] for i, count in enumerate(steps)}
    with new_figure(path, 0.75 + 4.9 * len(costs), 5.6) as figure:
        axes = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
        for ax, (cost, label) in zip(axes, costs, strict=True):
            front = front_of(points, metric, cost)
            at = [(getattr(point, cost), point.scores[metric]) for point in front]
            ax.plot(*zip(*at, strict=True), color=DARK, linewidth=1.2, zorder=1, drawstyle="steps-post")
            for point in points:
                colour, marker = LOOK[point.guidance][1], shapes[point.steps]
                bold: dict[str, Any] = {"s": 26, "alpha": 0.4, "edgecolors": "none", "zorder": 2}
                if point in front:
                    bold = {"s": 52, "alpha": 1, "edgecolors": DARK, "zorder": 3}
                ax.scatter(getattr(point, cost), point.scores[metric], marker=marker, color=colour, **bold)
            offset, side = ((-3, -5), "top") if METRICS[metric].lower else ((-3, 5), "bottom")
            for point, place in zip(front, at, strict=True):
                name, colour = "sched." if point.scheduled else point.budget, LOOK[point.guidance][1]
                look = {"size": 8, "ha": "right", "va": side, "color": colour}
                ax.annotate(name, place, xytext=offset, textcoords="offset points", **look)
            if present is not None and present[1] is not None:
                ax.plot(*present, color="#e11d48", marker="o", markersize=13, fillstyle="none", markeredgewidth=2.5)
            elif present is not None:
                ax.axvline(present[0], color="#e11d48", linestyle="--")
            _log(ax.xaxis, ax.set_xscale, [getattr(point, cost) for point in points])
            _log(ax.yaxis, ax.set_yscale, [point.scores[metric] for point in points], metric)
            ax.set(xlabel=label)
            ax.grid(alpha=0.25)
        figure.axes[0].set_ylabel(quality_label(metric))
        looks = [(*LOOK[kind][:2], "o") for kind in LOOK if any(point.guidance == kind for point in points)]
        looks += [(f"{count} steps", GREY, shapes[count]) for count in steps]
        keys = [
            Line2D([], [], linestyle="none", label=label, color=colour, marker=marker)
            for label, colour, marker in looks
        ]
        keys.append(Line2D([], [], color=DARK, linewidth=1.2, label="Pareto front (latents per window)"))
        columns = min(len(keys), 4 * len(costs))
        figure.legend(handles=keys, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def degradation_curves(points: Sequence[Point], metric: str, path: Path) -> None:
    """ρ against the share of the latents, a line a kind at its best scale, a panel a step count (paper Table 5)."""
    steps = sorted({point.steps for point in points})[-MAX_PANELS:]
    ratios = degradations(points, metric)
    shares = sorted({point.share for point, _ in ratios if not point.scheduled})
    with _panels(path, len(steps), 3.4, "degradation ratio ρ (1: no loss)") as axes:
        for ax, count in zip(axes, steps, strict=True):
            ax.axhline(1, color=GREY, linewidth=1, linestyle="--")
            for kind, (name, colour, marker) in LOOK.items():
                of_kind = at_best_scale(points, metric, kind)
                here = [(point, rho) for point, rho in ratios if point in of_kind and point.steps == count]
                line = sorted((point.share, rho) for point, rho in here)
                if line:
                    ax.plot(*zip(*line, strict=True), color=colour, marker=marker, markersize=5, label=name)
            _log(ax.yaxis, ax.set_yscale, [rho for _, rho in ratios])
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_locator(FixedLocator(shares))
            ax.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
            ax.xaxis.set_minor_locator(NullLocator())
            ax.tick_params(axis="x", rotation=60 if len(shares) > 5 else 0)
            ax.set(xlabel="share of the latents", title=f"{count} step{'s' if count > 1 else ''}")
        named = {label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        legend = {"loc": "outside lower center", "ncols": len(named), "frameon": False, "fontsize": 9}
        axes[0].figure.legend([*named.values()], [*named], **legend)


def over_scales(points: Sequence[Point], label: str, path: Path, metric: str | None = None) -> None:
    """A metric, or saturation, against guidance scale at the most steps; a panel a budget (paper Figures 5 and 15)."""

    def value(point: Point) -> float:
        return point.scores[metric] if metric else point.saturation

    steps = max(point.steps for point in points)
    same_steps = [point for point in points if point.steps == steps]
    shown = evenly_spaced(budgets_of(same_steps), MAX_PANELS)
    # A poor budget must not flatten the others.
    with _panels(path, len(shown), 4.2, f"{label}, {steps} steps", share=metric is None) as axes:
        for ax, budget in zip(axes, shown, strict=True):
            here = [point for point in same_steps if point.budget == budget]
            plain = [point for point in here if point.guidance == "none"]
            for kind, (name, colour, marker) in LOOK.items():
                line = sorted((point for point in here if point.guidance == kind), key=lambda point: point.scale)
                if not line:
                    continue
                at = [(1.0, value(point)) for point in plain if kind != "none"]
                at += [(point.scale, value(point)) for point in line]
                named = f"{name}: {line[-1].gflops:.3g} GFLOPs"
                ax.plot(*zip(*at, strict=True), color=colour, marker=marker, label=named)
            if metric:
                _log(ax.yaxis, ax.set_yscale, [value(point) for point in here], metric)
            latents = budget if here[0].scheduled else f"{budget} latent{'s' if budget != '1' else ''}"
            title = "all tokens" if budget == "all" else f"{latents} ({100 * here[0].share:.3g}%)"
            ax.set_xlabel("guidance scale")
            ax.set_title(title, fontsize=11 if len(title) < 22 else 8)
            ax.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def at_best_scale(points: Sequence[Point], metric: str, kind: str) -> list[Point]:
    """The points of a kind of guidance at the scale of its best point; all of them without guidance."""
    of_kind = [point for point in points if point.guidance == kind]
    return [p for p in of_kind if p.scale == best(of_kind, metric).scale] if of_kind else []


def budgets_of(points: Sequence[Point]) -> list[str]:
    """By falling share of the latents."""
    return list(dict.fromkeys(point.budget for point in sorted(points, key=lambda point: -point.share)))


def quality_label(metric: str) -> str:
    name = metric.upper() if len(metric) < 4 else metric
    return f"{name} ({'lower' if METRICS[metric].lower else 'higher'} is better)"


@contextmanager
def _panels(path: Path, count: int, height: float, label: str, *, share: bool = True) -> Iterator[list[Axes]]:
    """A figure of `count` axes, at most three a row, legible on a small page. share: one y axis."""
    columns = 2 if count in (2, 4) else min(count, 3)
    rows = -(-count // columns)
    with new_figure(path, 3.3 * columns + 0.6, height * rows) as figure:
        axes = list(figure.subplots(rows, columns, sharey=share, squeeze=False).flat)
        for unused in axes[count:]:
            unused.remove()
        yield axes[:count]
        for ax in axes[:count]:
            ax.grid(alpha=0.25)
        figure.supylabel(label, fontsize=11)


def _log(axis: Axis, set_scale: Callable[[str], None], values: Sequence[float], metric: str | None = None) -> None:
    """Logarithmic, with plain numbers, for costs and distances that span more than a factor of 3."""
    falls = metric is None or METRICS[metric].lower
    if falls and min(values) > 0 and max(values) >= 3 * min(values):
        set_scale("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def samples_by_budget(rows: Sequence[tuple[str, Tensor]], headings: Sequence[str], path: Path) -> None:
    """A labelled row of images or clips (B, 1 or 3, ...) in [-1, 1] for every budget; clips as strips of frames."""
    pictures = [(label, as_pictures(samples)) for label, samples in rows]
    height, width = pictures[0][1].shape[2:]
    size = 8 if max(map(len, headings)) > 4 else None
    draw_sheet(pictures, headings, path, margin=1.6, cell=0.75 * width / height, heading_size=size)


def read_attention(images: Tensor, maps: Tensor, slots: Sequence[int], path: Path, *, title: str = "input") -> None:
    """Attention of the latents `slots`, and of all, over images (B, 1 or 3, H, W); maps (B, J, rows, columns)."""
    titles = [title, *(f"latent {j + 1}" for j in slots), "mean of all"]
    rows = [
        ("", [image, *(attention[j] for j in slots), attention.mean(0)])
        for image, attention in zip(images, maps, strict=True)
    ]
    draw_sheet(rows, titles, path, cell=1.05, heading_size=9)


def draw_sheet(
    rows: Sequence[tuple[str, Sequence[Tensor] | Tensor]],
    headings: Sequence[str],
    path: Path,
    *,
    cell: float,
    margin: float = 0.0,
    heading_size: int | None = None,
    window: Sequence[int] | None = None,
) -> None:
    """Labelled rows of images in [-1, 1], and maps (H, W) or their windows' borders; cell, margin: in inches."""
    height, width = rows[0][1][0].shape[-2:]
    with new_figure(path, margin + cell * len(headings), 0.4 + cell * height / width * len(rows)) as figure:
        axes = figure.subplots(len(rows), len(headings), squeeze=False)
        for line, (label, cells) in zip(axes, rows, strict=True):
            for ax, each in zip(line, cells, strict=True):
                if each.ndim == 3:
                    ax.imshow(to_uint8(each).movedim(0, -1).numpy(), cmap="gray", vmin=0, vmax=255)
                else:
                    ax.imshow(each.cpu().numpy(), cmap="magma", vmin=None if window else 0)
                    for draw, size, group in zip((ax.axhline, ax.axvline), each.shape, window or (), strict=False):
                        for border in range(group, size, group):
                            draw(border - 0.5, color="white", linewidth=0.8, alpha=0.7)
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
            line[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for ax, heading in zip(axes[0], headings, strict=True):
            ax.set_title(heading, size=heading_size)
