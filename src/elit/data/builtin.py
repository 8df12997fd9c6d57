"""Data sets that have a name: the built-in ones, and folders of IDX files."""

from collections.abc import Callable

from elit.data.digits import digits, moving_digits
from elit.data.idx import Split, fashion_mnist, idx_images
from elit.data.images import ImageSet

SETS: dict[str, Callable[[Split], ImageSet]] = {
    "digits": lambda split: digits(),
    "moving-digits": lambda split: moving_digits(),
    "fashion-mnist": fashion_mnist,
}
"""Training takes the split "train", references take "test"; the digits have one set for both."""
NAMES = (*SETS, "idx:FOLDER")


def is_named(name: str) -> bool:
    """Tells whether the name is a built-in data set; any other is a folder."""
    return name in SETS or name.startswith("idx:")


def named_images(name: str, *, split: Split = "train") -> ImageSet | None:
    """The data set of a name; None for any other, which is a folder's.

    Raises ValueError where the set is not on this machine.
    """
    if name.startswith("idx:"):
        return idx_images(name.removeprefix("idx:"), split)
    return SETS[name](split) if name in SETS else None
