"""Reading published files without running anything in them."""

import argparse
import pickletools
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from elit.compat import refused_global

Kind = Literal["elit", "sit", "dit"]
ENTRIES = {"model", "ema", "opt", "args", "steps"}


def read_file(path: Path, name: str) -> Any:
    """What torch.save put into a file, none of it run; tensors stay on disk until they are used."""
    if not path.is_file():
        raise ValueError(f"{name}: no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, MemoryError):
        raise
    except Exception as error:
        # Bytes of any kind may come here, and torch's reader fails in as many ways; each is the file's fault.
        if refused := refused_global(error):
            raise ValueError(f"{name}: holds {refused}, which is no weight; not loaded, nothing was run") from None
        if called := called_by_pickle(path):
            raise ValueError(f"{name}: is a pickle that would call {called}; not loaded, nothing was run") from None
        raise ValueError(f"{name}: truncated, damaged or no checkpoint of torch; download it again") from None


def called_by_pickle(path: Path) -> str | None:
    """The first function or class that a bare pickle names, read and not run; None where it names none."""
    strings: list[str] = []
    with path.open("rb") as file, suppress(Exception):  # bytes of any kind, which pickletools refuses in many ways
        for opcode, value, _ in pickletools.genops(file.read(1 << 20)):
            if opcode.name == "GLOBAL":
                return str(value).replace(" ", ".")
            if opcode.name == "STACK_GLOBAL":
                return ".".join(strings[-2:])
            if isinstance(value, str):
                strings.append(value)
    return None


def weights_and_settings(content: Any, name: str, wanted: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and settings of a file: a training run's entries, or bare weights."""
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{name}: holds no weights by name")
    settings: Any = argparse.Namespace()
    weights = content
    if not any(isinstance(value, Tensor) for value in content.values()):
        if extra := sorted(set(content) - ENTRIES):
            raise ValueError(f"{name}: unknown entry {extra[0]!r}; a checkpoint has {', '.join(sorted(ENTRIES))}")
        if missing := sorted({wanted, "args"} - set(content)):
            raise ValueError(f"{name}: entry {missing[0]!r} is missing")
        weights, settings = content[wanted], content["args"]
    if not isinstance(settings, argparse.Namespace):
        raise ValueError(f"{name}: entry 'args' is a {type(settings).__name__}, expected a Namespace")
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        raise ValueError(f"{name}: entry {wanted!r} holds no weights by name")
    for key, value in weights.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout != torch.strided:
            raise ValueError(f"{name}: {key!r} is no tensor of floating-point weights")
    return weights, vars(settings)


def kind_of(weights: dict[str, Tensor], settings: dict[str, Any], name: str) -> Kind:
    if "encoder_depth" in settings or is_elit(weights, settings):
        return "elit"
    for kind in ("sit", "dit"):
        if str(settings.get("model")).lower().startswith(kind):
            return kind
    raise ValueError(f"{name}: bare weights, and those of SiT and DiT look the same; give kind as sit or dit")


def is_elit(weights: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    editors = ("input_token_editor.", "output_token_editor.")
    return str(settings.get("model")).startswith("ELIT-") or any(key.startswith(editors) for key in weights)


def check_settings(kind: Kind, settings: dict[str, Any], name: str) -> None:
    """Raises ValueError for a network that would load and then say something else than it should."""
    if settings.get("qk_norm"):
        raise ValueError(f"{name}: trained with qk_norm={settings['qk_norm']!r}; only files without it can be loaded")
    if kind == "dit":
        return
    for key, valid in (("path_type", ("linear",)), ("prediction", ("v", "velocity"))):
        if str(settings.get(key, valid[0])).lower() not in valid:
            raise ValueError(f"{name}: trained with {key}={settings[key]!r}; only {valid[-1]} can be loaded")
