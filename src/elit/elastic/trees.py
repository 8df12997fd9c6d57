"""Nested arguments of a forward: dictionaries, lists and tuples of tensors and plain values; on disk, and by sample.

Rows are the samples of a batch. A *layout* is a tree that is True where a tree's entry has one row for each sample.
"""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elit.files import replacing

Tree = Any
"""A tensor, a plain value, or a dictionary, list or tuple of trees."""
Arguments = dict[str, Tree]


def map_tree(change: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """`change` of every leaf, and of the entries of `others` at the same place, which may go on below it."""
    if isinstance(tree, Mapping):
        return {name: map_tree(change, each, *(other[name] for other in others)) for name, each in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map_tree(change, *parts) for parts in zip(tree, *others, strict=True))
    return change(tree, *others)


def map_tensors(change: Callable[[Tensor], Any], tree: Tree) -> Tree:
    return map_tree(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def layout_of(one: Tree, two: Tree, rows: tuple[int, int]) -> Tree:
    """The layout of a call, told from one with rows[0] samples and one with rows[1]."""
    if isinstance(one, Mapping):
        return {name: layout_of(each, two[name], rows) for name, each in one.items()}
    sized = one.ndim > 0 if isinstance(one, Tensor) else isinstance(one, list | tuple)
    if sized and (len(one), len(two)) == rows:
        return True
    if isinstance(one, list | tuple):
        return type(one)(layout_of(*pair, rows) for pair in zip(one, two, strict=True))
    return False


def take_rows(layout: Tree, tree: Tree, rows: slice) -> Tree:
    return map_tree(lambda by_row, value: value[rows] if by_row else value, layout, tree)


def join_rows(layout: Tree, trees: list[Tree]) -> Tree:
    """One tree of all rows; what has none is the first one's."""

    def join(by_row: bool, *values: Any) -> Any:
        if not by_row:
            return values[0]
        return torch.cat(values) if isinstance(values[0], Tensor) else [row for value in values for row in value]

    return map_tree(join, layout, *trees)


def write_tree(tree: Tree, path: Path) -> None:
    """Writes a file whole or not at all; a tensor that occurs twice is in it once. Raises OSError without room."""
    with replacing(path) as temporary:
        try:
            torch.save(tree, temporary)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise OSError(f"cannot write {str(path)!r}: {reason}; make room, or give another folder") from None


def read_tree(path: Path) -> Tree:
    """A tree on the CPU, mapped into memory. Raises ValueError where the file is damaged."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error) or "it ends too early").splitlines()[0]
        raise ValueError(f"cannot read {str(path)!r}: damaged ({reason}); remove it and run again") from None
