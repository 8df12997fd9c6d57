"""Reading published files without running anything in them."""

import argparse
import pickletools
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elit.compat import refused_global


def read_file(path: Path, entry: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and settings of a checkpoint: `entry` of a training run's file, or bare weights without settings.

    Nothing in the file is executed; tensors stay on disk until they are used. Raises ValueError.
    """
    if not path.is_file():
        raise ValueError("no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch's reader fails in many ways on arbitrary bytes; each is the file's fault
        if refused := refused_global(error) or called_by_pickle(path):
            raise ValueError(f"holds {refused}, which is not a weight; not loaded, nothing was run") from None
        raise ValueError("truncated, damaged or not a torch checkpoint; download it again") from None
    if not isinstance(content, dict):
        raise ValueError("holds no weights by name")
    settings: Any = argparse.Namespace()
    if not any(isinstance(value, Tensor) for value in content.values()):
        if missing := sorted({entry, "args"} - set(content)):
            raise ValueError(f"entry {missing[0]!r} is missing")
        content, settings = content[entry], content["args"]
    if not isinstance(settings, argparse.Namespace) or not isinstance(content, dict):
        raise ValueError(f"entries {entry!r} and 'args' must be weights by name and a Namespace")
    for key, value in content.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout != torch.strided:
            raise ValueError(f"{key!r} must be a tensor of floating-point weights")
    return content, vars(settings)


def called_by_pickle(path: Path) -> str | None:
    """The first function or class that a bare pickle names, without running it; None where it names none."""
    strings: list[str] = []
    with path.open("rb") as file, suppress(Exception):  # pickletools refuses arbitrary bytes in many ways
        for opcode, value, _ in pickletools.genops(file.read(1 << 20)):
            if opcode.name == "GLOBAL":
                return str(value).replace(" ", ".")
            if opcode.name == "STACK_GLOBAL":
                return ".".join(strings[-2:])
            if isinstance(value, str):
                strings.append(value)
    return None
