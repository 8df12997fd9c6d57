"""Models that come with the package: a folder each, as `save_pretrained` writes it, with its card beside it."""

import os
import tempfile
from pathlib import Path

from elit.files import existing

HERE = Path(__file__).parent
NAMES = ("fashion",)
DEFAULT = NAMES[0]
"""Model that the playground opens with."""


def model_folder(model: str | Path) -> Path:
    """The folder of a model of this package, by its name; any other name, or a folder of that name here, as it is."""
    path = existing(model, "model")
    return HERE / path if str(model) in NAMES and not path.exists() else path


def model_name(folder: str | Path) -> str:
    """What `model_folder` gave that folder for: a name for one of this package, else the folder as it is."""
    path = Path(folder)
    return path.name if path.parent == HERE and path.name in NAMES else str(folder)


def measurements_folder(folder: Path) -> Path:
    """Where what is measured of a saved model is kept: its own folder, or the user's cache for one of this package."""
    if HERE not in folder.absolute().parents:
        return folder
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a name, as in a container, and no HOME
        cache = Path(tempfile.gettempdir())
    return cache / "elit" / folder.relative_to(HERE)
