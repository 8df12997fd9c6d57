"""Saved networks: written under a temporary name and renamed, checked when read; and where checkpoints of a run lie."""

import hashlib
import json
import logging
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open

from elit.compat import lone_process
from elit.config import require
from elit.files import fingerprint, whole_folder, write_folder
from elit.models.presets import NETWORKS
from elit.models.transformer import Transformer
from elit.pretrained import model_folder

MANIFEST = "checkpoint.json"
ELASTIC = "elastic.json"  # beside the weights of an elastified network
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence loading in the block: errors are one line. The bars of diffusers stay on a terminal."""
    bars = diffusers_logging.is_progress_bar_enabled()
    logging.disable(logging.CRITICAL)
    if not sys.stderr.isatty():
        diffusers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)
        if bars:
            diffusers_logging.enable_progress_bar()


def check_hub_name(argument: str, name: str) -> None:
    """Raises ValueError for a name that is neither a folder nor OWNER/NAME, before any request to the hub."""
    valid = Path(name).is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII)
    require(bool(valid), argument, name, "a folder, or OWNER/NAME on the hub")


def load_own(folder: str | Path, *, name: str = "model", **kwargs: Any) -> Transformer:
    """The network of this library saved in `folder`, which errors call `name`; see `elit.load_model`."""
    folder = whole_folder(model_folder(folder))
    if (folder / "model_index.json").is_file():
        folder = folder / "transformer"
    saved = saved_class(folder, name)
    averaged = (folder / MANIFEST).is_file()
    dtype = None if averaged else saved_dtype(folder, name)
    network = known_networks().get(str(saved))
    if network is None or (folder / ELASTIC).is_file():
        valid = f"a folder of one of {', '.join(NETWORKS)} or of an imported class of yours, not of a {saved!r}"
        raise ValueError(f"{name} must be {valid}, got {str(folder)!r}")
    return _load_average(folder, network, **kwargs) if averaged else load_whole(network, folder, dtype, **kwargs)


def known_networks() -> dict[str, type[Transformer]]:
    """Classes by the `_class_name` of a config.json: those of this library, and others derived from them elsewhere."""
    return subclasses(Transformer) | NETWORKS


def subclasses(kind: type) -> dict[str, Any]:
    """Imported subclasses of `kind` by name, without elastified ones, which have the name of their own class."""
    kinds: list[type] = [kind]
    for each in kinds:  # which grows
        kinds += each.__subclasses__()
    return {each.__name__: each for each in kinds if each.__name__ not in [base.__name__ for base in each.__mro__[1:]]}


def load_whole(kind: Any, folder: Path, dtype: torch.dtype | None, **kwargs: Any) -> Any:
    """`kind.from_pretrained`, by default in `dtype`. Raises ValueError where weights and config.json do not fit."""
    kwargs = {"torch_dtype": dtype} | {key: value for key, value in kwargs.items() if value is not None}
    try:
        model, loading = kind.from_pretrained(folder, output_loading_info=True, **kwargs)
    except TypeError as error:
        raise ValueError(f"cannot load {str(folder)!r}: its config.json is invalid ({error})") from None
    # diffusers would start missing weights at random, with a warning.
    wrong = sorted([*loading["missing_keys"], *loading["unexpected_keys"], *map(str, loading["mismatched_keys"])])
    if wrong:
        raise ValueError(f"cannot load {str(folder)!r}: its weights do not fit its config.json, {wrong[0]} for one")
    return model


def _load_average(folder: Path, network: type[Transformer], torch_dtype: torch.dtype = torch.float32) -> Transformer:
    if fault := damage(folder):
        raise ValueError(fault)
    import torch.distributed.checkpoint as dcp  # of checkpoints alone

    model = network.from_config(network.load_config(folder))
    average = {name: torch.empty_like(weight) for name, weight in model.named_parameters()}
    with lone_process():
        dcp.load({"average": average}, checkpoint_id=folder, no_dist=True)
    model.load_state_dict(average, strict=False)
    return torch.nn.Module.to(model, torch_dtype).eval()


def saved_class(folder: Path, name: str) -> str | None:
    """The class named in a folder's config.json. Raises ValueError."""
    require((folder / "config.json").is_file(), name, str(folder), "a folder that save_pretrained wrote")
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError):
        raise ValueError(f"cannot load {str(folder)!r}: its config.json is damaged; save or copy it again") from None


def saved_dtype(folder: Path, name: str) -> torch.dtype:
    """The dtype in which most of a folder's weights were saved; diffusers would make float32. Raises ValueError."""
    files, counts = list(folder.glob("*.safetensors")), Counter[str]()
    require(bool(files), name, str(folder), "a folder with .safetensors in it, saved to the end")
    for file in files:
        try:
            with safe_open(file, "pt") as weights:
                counts.update(weights.get_slice(key).get_dtype() for key in weights.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"cannot load {str(file)!r}: half-written or damaged ({error})") from None
    return next((DTYPES[kind] for kind, _ in counts.most_common() if kind in DTYPES), torch.float32)


def load_shared_weights(model: Transformer, folder: str | Path) -> tuple[list[str], list[str]]:
    """Copies what a saved model has of `model`'s weights, by name and shape; see `TrainConfig.init`."""
    saved = load_own(folder, name="init").state_dict()
    own = model.state_dict()
    shared = {name: value for name, value in saved.items() if name in own and own[name].shape == value.shape}
    if not any(value.ndim > 1 for value in shared.values()):
        raise ValueError(f"cannot start from {str(folder)!r}: it shares no weights with the network")
    model.load_state_dict(shared, strict=False)
    return sorted(set(own) - set(shared)), sorted(set(saved) - set(shared))


def weights_digest(network: torch.nn.Module) -> str:
    """SHA-256 of all weights and buffers, by name, as float32."""
    total = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        total.update(name.encode() + value.float().cpu().numpy().tobytes())
    return total.hexdigest()


def save_model(model: ModelMixin, folder: str | Path) -> None:
    """`model.save_pretrained(folder)`, whole or not at all."""
    write_folder(Path(folder), model.save_pretrained)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; their names are step-00001000 and so on."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdigit())


def checkpoint_step(path: Path) -> int:
    return int(path.name[5:])


def damage(path: Path, rank: int = 0, world: int = 1) -> str | None:
    """The fault of a checkpoint, None where there is none; one of `world` readers checks its share of the files."""
    fault = f"cannot read {str(path)!r}: its {{}} is missing or damaged; remove that folder to resume"
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return fault.format(MANIFEST)
    for name in sorted(files)[rank::world]:
        if not (path / name).is_file() or fingerprint(path / name) != files[name]:
            return fault.format(name)
    return None
