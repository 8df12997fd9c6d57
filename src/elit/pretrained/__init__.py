"""Models in the package: a folder each, as `save_pretrained` writes it, with its card."""

import os
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
NAMES = ("fashion",)
DEFAULT = NAMES[0]
"""Model that the playground opens with."""


def model_folder(model: str | Path) -> Path:
    """The folder of a model in this package, by its name; any other name, and a folder of that name here, unchanged."""
    path = Path(model)
    return HERE / path if str(model) in NAMES and not path.exists() else path


def model_name(folder: str | Path) -> str:
    """The inverse of `model_folder`: the name of a model in this package, any other folder unchanged."""
    path = Path(folder)
    return path.name if path.parent == HERE and path.name in NAMES else str(folder)


def measurements_folder(folder: Path) -> Path:
    """The folder for measurements of a saved model: its own, or one in the user's cache for a model in this package."""
    if HERE not in folder.absolute().parents:
        return folder
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a name, as in a container, and no HOME
        cache = Path(tempfile.gettempdir())
    return cache / "elit" / folder.relative_to(HERE)
