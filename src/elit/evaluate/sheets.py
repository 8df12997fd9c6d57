"""Sheets of labelled pictures and maps: samples by budget, and Read's attention."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor

from elit.evaluate.plots import new_figure
from elit.sampling.pictures import as_pictures, save_frames, to_uint8


def samples_by_budget(rows: Sequence[tuple[str, Tensor]], headings: Sequence[str], path: Path) -> None:
    """A labelled row of images or clips (B, 1 or 3, ...) in [-1, 1] for every budget; clips as strips of frames."""
    pictures = [(label, as_pictures(samples)) for label, samples in rows]
    height, width = pictures[0][1].shape[2:]
    size = 8 if max(map(len, headings)) > 4 else None
    draw_sheet(pictures, headings, path, margin=1.6, cell=0.75 * width / height, heading_size=size)


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
    """Labelled rows of images (1 or 3, H, W) in [-1, 1] and maps (H, W), each `cell` inches wide.

    margin: inches of the labels. window: rows and columns of a group, whose borders are drawn in the maps.
    """
    height, width = rows[0][1][0].shape[-2:]
    size = margin + cell * len(headings), 0.4 + cell * height / width * len(rows)
    with new_figure(path, *size) as figure:
        axes = figure.subplots(len(rows), len(headings), squeeze=False)
        for line, (label, cells) in zip(axes, rows, strict=True):
            for ax, each in zip(line, cells, strict=True):
                if each.ndim == 3:
                    ax.imshow(to_uint8(each).movedim(0, -1).numpy(), cmap="gray", vmin=0, vmax=255)
                else:
                    _draw_map(ax, each, window)
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
            line[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for ax, heading in zip(axes[0], headings, strict=True):
            ax.set_title(heading, size=heading_size)


def _draw_map(ax: Axes, map_: Tensor, window: Sequence[int] | None) -> None:
    """A map (rows, columns) from 0, or over its own range with the borders of its windows."""
    ax.imshow(map_.cpu().numpy(), cmap="magma", vmin=None if window else 0)
    for line, across, length in zip((ax.axhline, ax.axvline), window or (), map_.shape, strict=False):
        for border in range(across, length, across):
            line(border - 0.5, color="white", linewidth=0.8, alpha=0.7)
