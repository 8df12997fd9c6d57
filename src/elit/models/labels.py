"""Classes by number or by name."""

import difflib
import re
from collections.abc import Sequence


def class_numbers(labels: Sequence[int | str], names: Sequence[str], num_classes: int) -> list[int]:
    """Numbers of classes given by number (3, "3") or by name, in any case, with spaces, hyphens or underscores.

    names: of the classes 0, 1, …; may be empty. Raises ValueError naming the closest names.
    """
    numbers = {_plain(name): number for number, name in reversed(list(enumerate(names)))}
    found = []
    for label in labels:
        if not isinstance(label, str):
            found.append(label)
        elif label.strip().lstrip("+-").isdecimal():
            found.append(int(label))
        elif _plain(label) in numbers:
            found.append(numbers[_plain(label)])
        elif not names:
            valid = f"numbers from 0 to {num_classes - 1}, since this model has no class names"
            raise ValueError(f"labels must be {valid}, got {label!r}")
        else:
            close = difflib.get_close_matches(_plain(label), numbers, n=3, cutoff=0.5)
            near = f"did you mean {', '.join(repr(names[numbers[name]]) for name in close)}? " if close else ""
            known = f"{', '.join(names[:20])}{', …' * (len(names) > 20)}"
            raise ValueError(f"labels must be classes of this model, got {label!r}; {near}classes: {known}")
    return found


def _plain(name: str) -> str:
    return " ".join(re.split(r"[\s_-]+", name.strip().casefold()))
