"""Pictures of the inside of a network: what Read reads, where the loss is, which latents matter."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from elit.evaluate import plots
from elit.evaluate.inspect.inspection import Inspection
from elit.evaluate.plots import BLUE, GREY, ORANGE, STYLE, bare, save_figure, show_picture
from elit.sampling.pictures import to_uint8

SHOWN = 6  # samples shown one by one


def attention_and_loss(inspection: Inspection, path: Path) -> None:
    """Both maps at every time, means over samples, and the rank correlation of every sample (paper Figure 2)."""
    times = inspection.numbers["made"]["times"]
    with mpl.rc_context(STYLE):
        maps, chart = 2 * (0.5 + 1.55 * _aspect(inspection.maps["loss"])), 3.1  # inches
        figure = Figure(figsize=(max(7.0, 1.0 + 1.75 * len(times)), maps + chart), dpi=130, layout="constrained")
        parts = figure.subfigures(2, 1, height_ratios=(maps, chart), squeeze=False)
        above, below = parts[0, 0], parts[1, 0]
        panels = above.subplots(2, len(times), squeeze=False)
        rows = (("attention", "Read attention,\nsummed over latents"), ("loss", "flow-matching\nloss"))
        for row, (name, label) in zip(panels, rows, strict=True):
            for ax, time, map_ in zip(row, times, inspection.maps[name].mean(1), strict=True):
                _heat(ax, map_, inspection.window, colourbar=True)
                if name == "attention":
                    ax.set_title(f"t = {time:g}")
            row[0].set_ylabel(label, rotation=0, ha="right", va="center")
        _correlations(below.subplots(), inspection)
        save_figure(figure, path)


def _correlations(ax: Axes, inspection: Inspection) -> None:
    """Every sample a dot, mean and standard deviation beside them."""
    times = inspection.numbers["made"]["times"]
    kinds = (
        ("over the whole sample", BLUE, "spearman", inspection.look.correlation()),
        ("inside windows", ORANGE, "in_windows", inspection.look.correlation_in_windows()),
    )
    for k, (label, colour, key, values) in enumerate(kinds):
        for i in range(len(times)):
            dots = values[i][~values[i].isnan()].numpy()
            at = i + 0.36 * k - 0.18
            ax.scatter(at + np.linspace(-0.09, 0.03, len(dots)), dots, s=9, color=colour, alpha=0.35, linewidths=0)
            spread = inspection.numbers["attention_and_loss"][i][key]
            if spread["mean"] is not None:
                ax.errorbar(at + 0.08, spread["mean"], spread["std"], color=colour, marker="o", capsize=3)
        ax.plot([], [], color=colour, marker="o", label=label)
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.set(xticks=range(len(times)), xticklabels=[f"t = {time:g}" for time in times], ylim=(-1.05, 1.05))
    ax.set_ylabel("rank correlation of\nattention and loss")
    ax.grid(alpha=0.25, axis="y")
    ax.legend(frameon=False, title="a dot a sample; mean ± standard deviation", ncols=2, loc="lower center")


def examples(inspection: Inspection, path: Path) -> None:
    """Single samples at the middle one of the times: what they are, Read attention, loss, and their correlation."""
    count = min(SHOWN, len(inspection.names))
    middle = len(inspection.maps["loss"]) // 2
    correlations = inspection.look.correlation()[middle]
    with mpl.rc_context(STYLE):
        figure = Figure(
            figsize=(1.3 + 1.35 * count, 0.4 + 4.2 * _aspect(inspection.pictures)), dpi=130, layout="constrained"
        )
        axes = figure.subplots(3, count, squeeze=False)
        for i in range(count):
            show_picture(axes[0, i], to_uint8(inspection.pictures[i : i + 1]).numpy()[0])
            axes[0, i].set_title("no ρ" if correlations[i].isnan() else f"ρ = {correlations[i]:.2f}")
            for ax, name in zip(axes[1:, i], ("attention", "loss"), strict=True):
                _heat(ax, inspection.maps[name][middle, i], inspection.window)
        for ax, label in zip(axes[:, 0], ("data", "attention", "loss"), strict=True):
            ax.set_ylabel(label, rotation=0, ha="right", va="center")
        save_figure(figure, path)


def latents_read(inspection: Inspection, path: Path) -> None:
    """What the first and the last latents read in single samples, mean over the times (paper Figure 12)."""
    count, latents = min(SHOWN, len(inspection.names)), inspection.maps["latents"].shape[1]
    slots = sorted({*range(min(3, latents)), *range(max(0, latents - 3), latents)})
    plots.read_attention(
        inspection.pictures[:count], inspection.maps["latents"][:count], slots, path, images_are="data"
    )


def entropy(inspection: Inspection, path: Path) -> None:
    """How widely each latent reads, a line a time, mean and spread over the samples."""
    rows, times = inspection.numbers["latents"], inspection.numbers["made"]["times"]
    numbers = [row["latent"] for row in rows]
    mean, std = (np.array([row[key] for row in rows]) for key in ("entropy", "std"))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.2), dpi=130, layout="constrained")
        ax = figure.subplots()
        for i, time in enumerate(times):
            colour = mpl.colormaps["viridis"](0.9 * i / max(1, len(times) - 1))
            ax.plot(numbers, [row["by_t"][i] for row in rows], color=colour, linewidth=1, label=f"t = {time:g}")
        ax.fill_between(numbers, mean - std, mean + std, color=GREY, alpha=0.25, linewidth=0)
        ax.plot(numbers, mean, color="black", marker="o", label="mean ± std of samples")
        ax.axhline(rows[0]["most"], color=GREY, linestyle="--", label="all tokens alike")
        ax.set(xlabel="latent", ylabel="entropy of its attention (nats)", ylim=(0, 1.08 * max(rows[0]["most"], 0.1)))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.secondary_yaxis("right", functions=(np.exp, lambda tokens: np.log(np.maximum(tokens, 1e-9)))).set(
            ylabel="tokens, e to the entropy", yticks=_powers(inspection.look.tokens_per_group)
        )
        ax.grid(alpha=0.25)
        figure.legend(frameon=False, loc="outside right upper", fontsize=9)
        save_figure(figure, path)


def latents_matter(inspection: Inspection, path: Path) -> None:
    """What the loss rises by as each latent is dropped, and the loss of every budget; bars are standard errors."""
    without, budgets = inspection.numbers["without"], inspection.numbers["budgets"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4), dpi=130, layout="constrained")
        left, right = figure.subplots(1, 2)
        names = [f"{row['latents'][0]}" if len(row["latents"]) == 1 else _span(row["latents"]) for row in without]
        increases, errors = ([row[key] for row in without] for key in ("increase", "standard_error"))
        left.bar(range(len(without)), increases, yerr=errors, color=BLUE, ecolor=GREY, capsize=2)
        every = max(1, -(-len(names) // 16))
        left.set_xticks(range(0, len(names), every), names[::every])
        left.axhline(0, color=GREY, linewidth=0.8)
        left.set(xlabel="latent dropped, all others kept", ylabel="increase of the loss", title="Each one dropped")
        counts, losses, errors = ([row[key] for row in budgets] for key in ("latents", "loss", "standard_error"))
        right.errorbar(counts, losses, errors, color=ORANGE, ecolor=GREY, marker="o", markersize=4, capsize=2)
        right.set(xlabel="latents kept per group", ylabel="flow-matching loss", title="The tail cut")
        right.xaxis.set_major_locator(MaxNLocator(integer=True))
        for ax in (left, right):
            ax.grid(alpha=0.25, axis="y")
        save_figure(figure, path)


def budgets(inspection: Inspection, path: Path) -> None:
    """The same noise at every budget (paper Figure 16)."""
    rows = [(f"{budget} latent{'s' if budget > 1 else ''}", images) for budget, images in inspection.samples.items()]
    plots.samples_by_budget(rows, [_wrapped(name) for name in inspection.sampled], path)


def _heat(ax: Axes, map_: Tensor, window: Sequence[int], *, colourbar: bool = False) -> None:
    """A map (rows, columns), with the borders of its windows."""
    image = ax.imshow(map_.numpy(), cmap="magma")
    for line, across, length in ((ax.axhline, window[0], map_.shape[0]), (ax.axvline, window[1], map_.shape[1])):
        for border in range(across, length, across):
            line(border - 0.5, color="white", linewidth=0.8, alpha=0.7)
    bare(ax)
    if colourbar:
        bar = ax.figure.colorbar(image, ax=ax, orientation="horizontal", shrink=0.9, aspect=14, pad=0.03)
        bar.locator = MaxNLocator(3)
        bar.ax.tick_params(labelsize=8)
        bar.outline.set_visible(False)


def _aspect(pictures: Tensor) -> float:
    """Rows over columns."""
    return pictures.shape[-2] / pictures.shape[-1]


def _powers(most: int) -> list[int]:
    """1, 2, 4, … and no more than `most`."""
    return [1 << i for i in range(most.bit_length()) if 1 << i <= most]


def _span(numbers: list[int]) -> str:
    return f"{numbers[0]}–{numbers[-1]}"


def _wrapped(name: str, width: int = 11) -> str:
    """A class or caption as a narrow heading, cut where it is long."""
    import textwrap

    return "\n".join(textwrap.wrap(name, width, max_lines=3, placeholder="…"))
