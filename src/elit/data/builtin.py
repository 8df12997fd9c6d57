"""Data sets that have a name: the built-in ones, and folders of IDX files. The names are known without torch."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from elit.data.images import ImageSet

NAMES = ("digits", "moving-digits", "fashion-mnist", "idx:FOLDER")


def is_named(name: str) -> bool:
    """Whether `named_images` knows the name; any other is a folder's."""
    return name in NAMES or name.startswith("idx:")


def named_images(name: str, *, split: Literal["train", "test"] = "train") -> "ImageSet | None":
    """The data set of a name in NAMES; None for any other name, which is a folder's.

    split: training takes "train", references take "test"; the digits have one set for both.
    Raises ValueError where the set is not on this machine.
    """
    from elit.data.digits import digits, moving_digits
    from elit.data.idx import fashion_mnist, idx_images

    if name == "digits":
        return digits()
    if name == "moving-digits":
        return moving_digits()
    if name == "fashion-mnist":
        return fashion_mnist(split)
    if name.startswith("idx:"):
        return idx_images(name.removeprefix("idx:"), split)
    return None
