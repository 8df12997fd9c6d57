"""ELIT, the Elastic Latent Interface Transformer: diffusion transformers with a compute dial.

Names are imported on first use: `import elit` loads neither torch nor diffusers. __init__.pyi lists them.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

from elit._version import __version__ as __version__

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_HOME = {alias.name: node.module for node in _STUB.body if isinstance(node, ast.ImportFrom) for alias in node.names}
__all__ = sorted(_HOME.keys() - {"__version__", "flow"})  # pyrefly: ignore[unresolvable-dunder-all]


def __getattr__(name: str) -> Any:
    if name == "flow":  # functions of tensors, a room of their own
        return import_module("elit.flow")
    if name not in _HOME:
        raise AttributeError(f"module 'elit' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(str(_HOME[name])), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
