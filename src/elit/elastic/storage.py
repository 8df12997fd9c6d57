"""Elastified transformers on disk: diffusers' own files, untouched, and the interface beside them.

FOLDER/config.json, diffusion_pytorch_model*.safetensors    as diffusers writes them
FOLDER/elastic.json                                         where the interface sits; size and CRC of its weights
FOLDER/elastic.safetensors                                  its weights
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from elit.compat import LORA_WEIGHT, WRAPPED_LAYER
from elit.elastic.families import FAMILIES
from elit.files import fingerprint, replacing, write_text
from elit.models.saved import ELASTIC

RECORD, WEIGHTS = ELASTIC, "elastic.safetensors"
VARIANT = "elastic"
NOTE = "; its weights were trained together with the interface and are no model without it"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterfaceRecord:
    """Where an interface sits in which class."""

    kind: str
    read_after: int
    write_after: int
    window: tuple[int, ...]
    mode: str
    changed: bool = False
    """The original weights have been trained along, and are no model without the interface."""
    lora_rank: int = 0
    """Of the low-rank changes of the blocks beside the interface; 0 for none."""
    original_at_full: bool = False
    """At full budget the original runs, without interface and changes: it was trained for the budgets below."""
    base: str | None = None
    """The pipeline that the interface was trained for."""


def sample_weights(transformer: nn.Module, count: int = 16) -> dict[str, Tensor]:
    """A few values of each of the original weights, by name, to tell later whether they were trained."""
    samples = {}
    for name, weight in transformer.named_parameters():
        if not name.startswith("elastic.") and LORA_WEIGHT not in name:
            try:
                values = weight.detach().flatten()
            except NotImplementedError:  # quantised by torchao; nobody trains it
                continue
            samples[name.replace(WRAPPED_LAYER, ".")] = values[:: max(1, len(values) // count)][:count].cpu().clone()
    return samples


def save_beside(transformer: Any, folder: str | Path, save: Callable[..., None]) -> None:
    """Writes `transformer` with `save`, diffusers' save_pretrained, and its interface beside it.

    The interface first: `save` may upload the folder. Raises ValueError where LoRAs hang on the weights.
    """
    if any(WRAPPED_LAYER in name for name, _ in transformer.named_parameters()):
        # diffusers would write them under names that from_pretrained does not find.
        raise ValueError(
            "transformer: has LoRA adapters; save those with save_lora_adapter, and delete or fuse them first"
        )
    folder, record = Path(folder), transformer.elastic_record
    now, then = sample_weights(transformer), transformer.elastic_samples
    changed = record.changed or any(not torch.equal(now[name], then[name].to(now[name].dtype)) for name in then)
    folder.mkdir(parents=True, exist_ok=True)
    # What is left if this stops half way is not taken for a whole model.
    stale = [path for path in folder.glob("diffusion_pytorch_model*") if changed and f".{VARIANT}" not in path.name]
    for path in (folder / RECORD, *stale):
        path.unlink(missing_ok=True)
    weights = {name: value.detach().contiguous().cpu() for name, value in transformer.elastic.state_dict().items()}
    with replacing(folder / WEIGHTS) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    content = dataclasses.asdict(dataclasses.replace(record, changed=changed))
    content["weights"] = fingerprint(folder / WEIGHTS)
    content["note"] = "load this folder, or the pipeline it is in, with elit.load_elastic" + NOTE * changed
    write_text(folder / RECORD, json.dumps(content, indent=2) + "\n")

    interface = transformer.elastic
    del transformer.elastic
    try:
        save(folder, **({"variant": VARIANT} if changed else {}))
    finally:
        transformer.elastic = interface


def read_record(folder: Path) -> InterfaceRecord:
    """What a folder's elastic.json says. Raises ValueError where it or the weights beside it are missing or damaged."""
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
