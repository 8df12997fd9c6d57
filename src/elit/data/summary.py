"""A look at a folder of images before they are trained on: what is there, and what a user may not expect."""

from collections import Counter

from elit.data.images import METADATA, SUFFIXES, ImageFolder

FEW = 8
"""Classes that are listed one by one, at most."""


def summary(data: ImageFolder, batch_size: int) -> list[str]:
    """Lines to print before a run: images a class, then one line for each thing that is out of the ordinary."""
    counts = Counter(label for _, label in data.files)
    lines = [f"data: {len(data):,} images, {_per_class(data, counts)}; {_sizes(data)}"]
    if not (data.root / METADATA).is_file():
        lines += _left_out(data)
    if see_through := [path for (path, _), look in zip(data.files, data.looks, strict=True) if look.transparent]:
        lines.append(
            f"data: {len(see_through)} images are transparent, {see_through[0].name!r} for one: what is behind that is "
            "trained on, and elit evaluate refuses them"
        )
    if small := sum(min(look.width, look.height) < data.image_size for look in data.looks):
        lines.append(f"data: {small} images are smaller than image_size={data.image_size} and are enlarged")
    if len(data) < batch_size:
        lines.append(f"data: {len(data)} images are fewer than a batch of {batch_size}, so that some repeat in it")
    return lines


def _per_class(data: ImageFolder, counts: Counter[int]) -> str:
    named = [(data.classes[label], counts[label]) for label in sorted(counts)]
    if len(named) <= FEW:
        return ", ".join(f"{name} {count}" for name, count in named)
    few, most = min(named, key=lambda each: each[1]), max(named, key=lambda each: each[1])
    return f"{len(named)} classes, from {few[1]} ({few[0]}) to {most[1]} ({most[0]})"


def _sizes(data: ImageFolder) -> str:
    least = min(data.looks, key=lambda look: look.width * look.height)
    most = max(data.looks, key=lambda look: look.width * look.height)
    low, high = (f"{look.width}×{look.height}" for look in (least, most))
    return f"all {low}" if low == high else f"{low} to {high}"


def _left_out(data: ImageFolder) -> list[str]:
    entries = sorted(path for path in data.root.iterdir() if path.name[0] != ".")
    links = [path.name for path in entries if path.is_dir() and path.is_symlink()]
    empty = [path.name for path in entries if path.is_dir() and path.name not in (*data.classes, *links)]
    strays = [path.name for path in entries if path.is_file() and path.suffix.lower() in SUFFIXES]
    lines = []
    if empty:
        lines.append(f"data: no images in {', '.join(map(repr, empty[:FEW]))}, so that they are no classes")
    if links:
        lines.append(f"data: links to folders are not followed: {', '.join(map(repr, links[:FEW]))}")
    if strays:
        lines.append(f"data: {len(strays)} images beside the classes' folders are left out, {strays[0]!r} for one")
    return lines
