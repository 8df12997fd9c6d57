"""Sheets of reports: samples by budget, and maps of Read's attention and the loss."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor

from elit.evaluate.inspect.attention import Inspection
from elit.evaluate.plots import new_figure
from elit.sampling.pictures import as_pictures, save_frames, to_uint8

MAX_EXAMPLES = 6
Rows = Sequence[tuple[str, Sequence[Tensor]]]


def samples_by_budget(rows: Sequence[tuple[str, Tensor]], headings: Sequence[str], path: Path) -> None:
    """A labelled row of images or clips (B, 1 or 3, ...) in [-1, 1] for every budget; clips as strips of frames."""
    pictures = [(label, list(as_pictures(samples))) for label, samples in rows]
    width = 0.75 / _aspect(pictures[0][1][0])
    _sheet(pictures, headings, path, 1.6, width, 0.8, heading_size=8 if max(map(len, headings)) > 4 else None)


def animate(rows: Sequence[tuple[str, Tensor]], headings: Sequence[str], path: Path) -> None:
    """Clips (B, 1 or 3, T, H, W) in [-1, 1] like the images of `samples_by_budget`, moving: a GIF that loops."""
    frames, still = [], path.with_suffix(".frame.png")
    for number in range(rows[0][1].shape[2]):
        samples_by_budget([(label, clips[:, :, number]) for label, clips in rows], headings, still)
        frames.append(Image.open(still).convert("RGB"))
    still.unlink()
    save_frames(frames, path)


def read_attention(images: Tensor, maps: Tensor, slots: Sequence[int], path: Path, *, title: str = "input") -> None:
    """Attention of the latents `slots`, and of all, over images (B, 1 or 3, H, W); maps (B, J, rows, columns)."""
    titles = [title, *(f"latent {j + 1}" for j in slots), "mean of all"]
    rows = [
        ("", [image, *(attention[j] for j in slots), attention.mean(0)])
        for image, attention in zip(images, maps, strict=True)
    ]
    _sheet(rows, titles, path, 0, 1.05, 1.05 * _aspect(images), heading_size=9)


def _sheet(
    rows: Rows,
    headings: Sequence[str],
    path: Path,
    margin: float,
    column: float,
    row: float,
    *,
    heading_size: int | None = None,
    window: Sequence[int] | None = None,
) -> None:
    """Labelled rows of images (C, H, W) and maps (H, W); inches of the margin, of a column and of a row.

    window: its borders are drawn in the maps.
    """
    with new_figure(path, margin + column * len(headings), 0.4 + row * len(rows)) as figure:
        axes = figure.subplots(len(rows), len(headings), squeeze=False)
        for line, (label, cells) in zip(axes, rows, strict=True):
            for ax, cell in zip(line, cells, strict=True):
                if cell.ndim == 3:
                    _picture(ax, cell)
                else:
                    _heat(ax, cell, window)
            line[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for ax, heading in zip(axes[0], headings, strict=True):
            ax.set_title(heading, size=heading_size)


def attention_and_loss(inspection: Inspection, path: Path) -> None:
    """Both maps at every time, means over samples (paper Figure 2)."""
    titles = [f"t = {time:g}" for time in inspection.numbers["made"]["times"]]
    names = {"attention": "Read attention,\nsummed over latents", "loss": "flow-matching\nloss"}
    rows = [(label, list(inspection.maps[name].mean(1))) for name, label in names.items()]
    _sheet(rows, titles, path, 2.2, 1.75, 1.75 * _aspect(inspection.maps["loss"]), window=inspection.window)


def examples(inspection: Inspection, path: Path) -> None:
    """Single samples at the middle one of the times: picture, Read attention, loss, and their correlation."""
    count, middle = min(MAX_EXAMPLES, len(inspection.names)), len(inspection.maps["loss"]) // 2
    correlations = inspection.read.correlation()[middle, :count]
    titles = ["no ρ" if value.isnan() else f"ρ = {value:.2f}" for value in correlations]
    maps = [(name, list(inspection.maps[name][middle, :count])) for name in ("attention", "loss")]
    rows = [("data", list(inspection.pictures[:count])), *maps]
    _sheet(rows, titles, path, 1.3, 1.35, 1.4 * _aspect(inspection.pictures), window=inspection.window)


def latents_read(inspection: Inspection, path: Path) -> None:
    """Attention of the first and the last latents in single samples, mean over the times (paper Figure 12)."""
    count, latents = min(MAX_EXAMPLES, len(inspection.names)), inspection.maps["latents"].shape[1]
    slots = sorted({*range(min(3, latents)), *range(max(0, latents - 3), latents)})
    read_attention(inspection.pictures[:count], inspection.maps["latents"][:count], slots, path, title="data")


def budgets(inspection: Inspection, path: Path) -> None:
    """The same noise at every budget (paper Figure 16)."""
    rows = [(f"{budget} latent{'s' if budget > 1 else ''}", images) for budget, images in inspection.samples.items()]
    names = ["\n".join(textwrap.wrap(name, 11, max_lines=3, placeholder="…")) for name in inspection.sampled]
    samples_by_budget(rows, names, path)


def _picture(ax: Axes, image: Tensor) -> None:
    """An image (1 or 3, H, W) in [-1, 1], without axes."""
    pixels = to_uint8(image).numpy()
    if pixels.shape[0] == 1:
        ax.imshow(pixels[0], cmap="gray", vmin=0, vmax=255)
    else:
        ax.imshow(pixels.transpose(1, 2, 0))
    _bare(ax)


def _bare(ax: Axes) -> None:
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def _heat(ax: Axes, map_: Tensor, window: Sequence[int] | None) -> None:
    """A map (rows, columns) from 0, or over its own range with the borders of its windows."""
    ax.imshow(map_.cpu().numpy(), cmap="magma", vmin=None if window else 0)
    for line, across, length in zip((ax.axhline, ax.axvline), window or (), map_.shape, strict=False):
        for border in range(across, length, across):
            line(border - 0.5, color="white", linewidth=0.8, alpha=0.7)
    _bare(ax)


def _aspect(pictures: Tensor) -> float:
    """Rows over columns."""
    return pictures.shape[-2] / pictures.shape[-1]
