"""Pictures of the dial: samples by budget, quality against cost, what the latents read."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from PIL import Image
from torch import Tensor

from elit.evaluate.run import Score
from elit.files import replacing
from elit.sampling.pictures import as_pictures, save_animation, to_uint8

BLUE, ORANGE, GREY = "#2563a8", "#d9822b", "#667085"
LOOK = {"none": ("no guidance", BLUE, "o"), "ccfg": ("CCFG", ORANGE, "s")}
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY}


def samples_by_budget(rows: Sequence[tuple[str, Tensor]], headings: Sequence[str], path: Path) -> None:
    """A row of images or clips (B, 1 or 3, ...) in [-1, 1] for every budget, labelled at its left; clips as strips."""
    save_figure(_sample_sheet([(label, as_pictures(samples)) for label, samples in rows], headings), path)


def animate(rows: Sequence[tuple[str, Tensor]], headings: Sequence[str], path: Path) -> None:
    """Clips (B, 1 or 3, T, H, W) in [-1, 1] as `samples_by_budget` shows images, moving: a GIF that loops."""
    pictures = []
    for frame in range(rows[0][1].shape[2]):
        buffer = io.BytesIO()
        _sample_sheet([(label, clips[:, :, frame]) for label, clips in rows], headings).savefig(buffer, format="png")
        pictures.append(Image.open(buffer).convert("RGB"))
    save_animation(pictures, path)


def _sample_sheet(rows: Sequence[tuple[str, Tensor]], headings: Sequence[str]) -> Figure:
    columns, (height, width) = len(headings), rows[0][1].shape[-2:]
    with mpl.rc_context(STYLE):
        size = (1.6 + 0.75 * columns * width / height, 0.4 + 0.8 * len(rows))
        figure = Figure(figsize=size, dpi=130, layout="constrained")
        axes = figure.subplots(len(rows), columns, squeeze=False)
        for row, (label, images) in zip(axes, rows, strict=True):
            for ax, image in zip(row, images, strict=True):
                show_picture(ax, to_uint8(image).numpy())
            row[0].set_ylabel(label, rotation=0, ha="right", va="center")
        size_of_headings = 8 if max(map(len, headings)) > 4 else None  # captions need the room
        for ax, heading in zip(axes[0], headings, strict=True):
            ax.set_title(heading, size=size_of_headings)
        return figure


def compute_quality(scores: Sequence[Score], path: Path) -> None:
    """Fréchet distance and accuracy against GFLOPs and against measured milliseconds (paper Figures 1 and 5)."""
    costs = (("gflops_per_image", "GFLOPs per sample"), ("ms_per_image", "ms per sample (measured)"))
    qualities = (("fd", "Fréchet distance (lower is better)"), ("accuracy", "class accuracy"))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.5, 7), dpi=130, layout="constrained")
        for row, (quality, quality_label) in zip(figure.subplots(2, 2), qualities, strict=True):
            for ax, (cost, cost_label) in zip(row, costs, strict=True):
                for kind, (name, colour, marker) in LOOK.items():
                    line = [score for score in scores if score.guidance == kind]
                    x = [getattr(score, cost) for score in line]
                    y = [getattr(score, quality) for score in line]
                    ax.plot(x, y, color=colour, marker=marker, label=name)
                    offset = (7, 5) if kind == "none" else (7, -11)
                    for score, at in zip(line, zip(x, y, strict=True), strict=True):
                        text = str(score.tokens_per_group)
                        ax.annotate(text, at, xytext=offset, textcoords="offset points", color=colour, size=8)
                ax.set(xlabel=cost_label, ylabel=quality_label)
                if quality == "fd":
                    ax.set_yscale("log")
                    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                    ax.yaxis.set_minor_formatter(NullFormatter())
                else:
                    ax.set_ylim(0, 1.08)
                ax.grid(alpha=0.25)
        figure.axes[2].legend(frameon=False, title="numbers: latents per group", loc="lower right")
        save_figure(figure, path)


def read_attention(
    images: Tensor, maps: Tensor, slots: Sequence[int], path: Path, *, images_are: str = "input"
) -> None:
    """What the latents `slots`, and all of them, read in each image (B, 1 or 3, H, W): maps (B, J, rows, columns)."""
    titles = [images_are, *(f"latent {j + 1}" for j in slots), "mean of all"]
    with mpl.rc_context(STYLE):
        size = (1.05 * len(titles), 0.4 + 1.05 * len(images) * images.shape[-2] / images.shape[-1])
        figure = Figure(figsize=size, dpi=130, layout="constrained")
        axes = figure.subplots(len(images), len(titles), squeeze=False)
        for row, image, attention in zip(axes, images, maps, strict=True):
            show_picture(row[0], to_uint8(image).numpy())
            panels = [attention[j] for j in slots] + [attention.mean(0)]
            for ax, panel in zip(row[1:], panels, strict=True):
                ax.imshow(panel.cpu().numpy(), cmap="magma", vmin=0)
                bare(ax)
        for ax, title in zip(axes[0], titles, strict=True):
            ax.set_title(title, size=9)
        save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def show_picture(ax: Axes, pixels: np.ndarray) -> None:
    """Pixels (1 or 3, H, W) uint8, without axes."""
    if pixels.shape[0] == 1:
        ax.imshow(pixels[0], cmap="gray", vmin=0, vmax=255)
    else:
        ax.imshow(pixels.transpose(1, 2, 0))
    bare(ax)


def bare(ax: Axes) -> None:
    """Takes the axes of a picture away."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
