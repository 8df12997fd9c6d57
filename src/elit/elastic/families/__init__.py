"""The classes known to `elit.elastify`, by name; `elit.register_family` adds to them."""

from typing import Any

from diffusers.utils.torch_utils import is_compiled_module
from torch import nn

from elit.elastic.families.family import Family
from elit.elastic.families.images import IMAGES
from elit.elastic.families.video import VIDEO

FAMILIES: dict[str, Family] = IMAGES | VIDEO
CLASSES: dict[str, Any] = {}  # those that were registered, by name: `elit.load_elastic` makes transformers of them


def register_family(kind: type[nn.Module], family: Family) -> None:
    """Makes transformers of the class `kind` known to `elit.elastify` and `elit.load_elastic`, by the class's name.

    family: an `elit.Family`; `elit.check_family` tests it. Raises ValueError for a name that is taken.
    """
    name = kind.__name__
    if FAMILIES.get(name, family) is not family:
        raise ValueError(f"cannot register a second family for {name}")
    FAMILIES[name], CLASSES[name] = family, kind


def family_of(transformer: object) -> Family:
    """The entry for a transformer's class. Raises ValueError where there is none."""
    for kind in type(transformer).__mro__:  # sharding puts a class of torch's in front
        if kind.__name__ in FAMILIES:
            return FAMILIES[kind.__name__]
    if is_compiled_module(transformer):
        raise ValueError("cannot elastify a compiled transformer: elastify it first, then compile it")
    name, known = type(transformer).__name__, ", ".join(FAMILIES)
    raise ValueError(f"cannot elastify a {name}: give its class to elit.register_family, or one of {known}")


def all_blocks(transformer: nn.Module) -> list[nn.Module]:
    """All blocks in the order in which forward runs them."""
    return [block for name in family_of(transformer).blocks for block in getattr(transformer, name)]
