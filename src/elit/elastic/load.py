"""load_elastic: a saved elastified transformer, or a pipeline that has one."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file

from elit.elastic.families import CLASSES, FAMILIES
from elit.elastic.storage import RECORD, VARIANT, WEIGHTS, InterfaceRecord
from elit.elastic.surgery import elastify
from elit.files import fingerprint
from elit.models.presets import NETWORKS
from elit.models.saved import check_weights


def load_elastic(folder: str | Path, **kwargs: Any) -> Any:
    """What `save_pretrained` wrote in `folder`: an elastified transformer, or the pipeline around it.

    kwargs: as in diffusers' from_pretrained, `torch_dtype` for one. Raises ValueError where the folder holds no
    elastified transformer, or one that is damaged.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        return _load_transformer(folder, **kwargs)
    parts = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    of_models = {name: value for name, value in kwargs.items() if name not in parts}
    elastic = {
        path.parent.name: _load_transformer(path.parent, **of_models) for path in sorted(folder.glob(f"*/{RECORD}"))
    }
    if not elastic:
        raise ValueError(
            f"folder={str(folder)!r}: none of this pipeline's parts has an {RECORD}; load it with diffusers"
        )
    return diffusers.DiffusionPipeline.from_pretrained(folder, **elastic, **kwargs)


def _load_transformer(folder: Path, **kwargs: Any) -> Any:
    record = _read_record(folder)
    check_weights(folder, "folder")
    kind = NETWORKS.get(record.kind) or CLASSES.get(record.kind) or getattr(diffusers, record.kind)
    variant = {"variant": VARIANT} if record.changed else {}
    transformer, found = kind.from_pretrained(folder, output_loading_info=True, **kwargs | variant)
    if wrong := sorted([*found["missing_keys"], *found["unexpected_keys"]]):
        raise ValueError(f"folder={str(folder)!r}: its weights do not fit its config.json, {wrong[0]} for one")
    _align(transformer)
    settings = {name: getattr(record, name) for name in ("read_after", "write_after", "window", "mode")}
    elastify(transformer, **settings)
    transformer.elastic_record = record
    weights = load_file(folder / WEIGHTS)
    own = {name: tuple(value.shape) for name, value in transformer.elastic.state_dict().items()}
    if own != {name: tuple(value.shape) for name, value in weights.items()}:
        raise ValueError(f"folder={str(folder)!r}: its {WEIGHTS} does not fit its {RECORD}; save or copy it again")
    transformer.elastic.load_state_dict(weights)  # into tensors of its own
    return transformer.eval()


def _align(transformer: torch.nn.Module) -> None:
    """Weights that lie in a mapped file where no allocator puts them take other kernels, and the last bit differs."""
    for weight in transformer.parameters():
        if weight.device.type == "cpu" and weight.data_ptr() % 64:
            weight.data = weight.data.clone()


def _read_record(folder: Path) -> InterfaceRecord:
    if not (folder / RECORD).is_file():
        raise ValueError(
            f"folder={str(folder)!r}: no {RECORD} in it; give a folder that an elastified model was saved in"
        )
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        size_and_sum, _ = content.pop("weights"), content.pop("note")
        record = InterfaceRecord(**content | {"window": tuple(content["window"])})
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"folder={str(folder)!r}: its {RECORD} is damaged; save or copy it again") from None
    if record.kind not in FAMILIES:
        raise ValueError(f"folder={str(folder)!r}: holds an elastified {record.kind!r}; known: {', '.join(FAMILIES)}")
    if not (folder / WEIGHTS).is_file() or fingerprint(folder / WEIGHTS) != size_and_sum:
        raise ValueError(f"folder={str(folder)!r}: its {WEIGHTS} is missing or damaged; save or copy it again")
    return record
